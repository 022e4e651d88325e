"""Re-estimated statistics against float64 averages over everything that a norm gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq import models
from kdq.quantize import apply, calibrate, uniform_rules
from kdq.quantize.ptq.fold_batch_norm import fold_batch_norm
from kdq.quantize.ptq.reestimate import reestimate


class Net(nn.Module):
    """Its evaluation mode has a name of its own; one norm takes the mode with the call."""

    frozen: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="first")(x)
        x = nn.relu(nn.BatchNorm(name="norm_0")(x, self.frozen))
        x = nn.Dense(4, name="second")(x)
        return nn.BatchNorm(use_running_average=self.frozen, name="norm_1", axis_name="devices")(x)


def _draw(model, x, seed=0, **kwargs):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 2, size=leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **kwargs), x)
    return jax.tree.map_with_path(draw, shapes)


def _batches(n, shape=(6, 3), seed=1):
    rng = np.random.default_rng(seed)
    return [jnp.asarray((k + 1) * rng.normal(size=shape) + k, jnp.float32) for k in range(n)]


def _round(x, quantizer):
    scale, zero, low, high = (
        np.asarray(getattr(quantizer, k), np.float64)
        for k in ("scale", "zero_point", "qmin", "qmax")
    )
    return (np.clip(np.round(x / scale + zero), low, high) - zero) * scale


def _expected(variables, qparams, batches):
    """What each norm gets, all batches, with each batch normalized by its own statistics."""
    params = jax.tree.map(np.float64, variables["params"])
    seen = {"norm_0": [], "norm_1": []}
    for x in batches:
        x = np.float64(x)
        for layer, norm in (("first", "norm_0"), ("second", "norm_1")):
            q = qparams.get(layer)
            kernel = params[layer]["kernel"]
            if q:
                x, kernel = _round(x, q["activations"]), _round(kernel, q["weights"])
            y = x @ kernel + params[layer]["bias"]
            seen[norm].append(y)
            z = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
            x = np.maximum(z * params[norm]["scale"] + params[norm]["bias"], 0)
    return {name: np.concatenate(values) for name, values in seen.items()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("quantized", [False, True])
def test_statistics_are_those_of_all_that_the_norm_gets(count, quantized):
    model, batches = Net(), _batches(count)
    variables = _draw(model, batches[0])
    rules = uniform_rules(3, 6)
    qparams = calibrate(model, variables, rules, batches, check=False) if quantized else {}
    found, same = reestimate(model, variables, qparams, batches)
    assert same is qparams
    assert found["params"] is variables["params"]
    for name, values in _expected(variables, qparams, batches).items():
        stats = found["batch_stats"][name]
        np.testing.assert_allclose(stats["mean"], values.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats["var"], values.var(0), rtol=1e-4, atol=1e-5)
        assert np.abs(stats["mean"] - variables["batch_stats"][name]["mean"]).max() > 0.1


def test_after_one_batch_the_quantized_convolutions_are_normalized():
    model = models.build("cnn", num_classes=3, widths=(4, 6), batch_norm=True)
    x = _batches(1, (8, 6, 6, 2))[0]
    variables = _draw(model, x)
    qparams = calibrate(model, variables, uniform_rules(2, 4), [x], check=False)
    found, _ = reestimate(model, variables, qparams, [x])
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, seen = jax.jit(lambda v, q: apply(model, v, q, x, **capture))(found, qparams)
    for name in ("norm_0", "norm_1"):
        y = np.asarray(seen["intermediates"][name]["__call__"][0], np.float64)
        own = variables["params"][name]
        np.testing.assert_allclose(y.mean((0, 1, 2)), own["bias"], atol=1e-4)
        np.testing.assert_allclose(y.std((0, 1, 2)), own["scale"], rtol=1e-3)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(3, name="dense")(x))
        self.sow("intermediates", "seen", y)
        return nn.relu(y), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0, "intermediates": 0}
        stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


@pytest.mark.slow
def test_each_layer_of_a_scanned_stack_has_its_own():
    model, x = Scanned(), _batches(1, (16, 3))[0]
    variables = _draw(model, x)
    qparams = calibrate(model, variables, uniform_rules(4, 8), [x], check=False)
    found, _ = reestimate(model, variables, qparams, [x])
    _, seen = apply(model, found, qparams, x, mutable=["intermediates"])
    values = np.asarray(seen["intermediates"]["layers"]["seen"][0], np.float64)
    own = variables["params"]["layers"]["norm"]
    np.testing.assert_allclose(values.mean(1), own["bias"], atol=1e-4)
    np.testing.assert_allclose(values.std(1), own["scale"], rtol=1e-3)


def test_a_shared_norm_and_one_with_a_mask_count_what_they_get():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=True, name="norm")
            masked = nn.BatchNorm(use_running_average=True, name="masked")
            mask = (jnp.arange(6) < 2)[:, None]
            return norm(x).sum() + norm(5 + x[:2]).sum() + masked(x, mask=mask)

    model, batches = Shared(), _batches(2)
    variables = _draw(model, batches[0])
    found, _ = reestimate(model, variables, {}, batches)
    everything = np.concatenate(
        [y for x in batches for y in (np.float64(x), 5 + np.float64(x[:2]))]
    )
    kept = np.concatenate([np.float64(x[:2]) for x in batches])
    for name, values in (("norm", everything), ("masked", kept)):
        stats = found["batch_stats"][name]
        np.testing.assert_allclose(stats["mean"], values.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"], values.var(0), rtol=1e-5, atol=1e-6)


def test_a_large_mean_loses_no_digits():
    model = nn.BatchNorm(use_running_average=True)
    x = _batches(1, (64, 3))[0] + 3000
    found, _ = reestimate(model, _draw(model, x), {}, [x])
    np.testing.assert_allclose(found["batch_stats"]["var"], np.float64(x).var(0), rtol=1e-3)


def test_a_folded_norm_stays_folded():
    model = models.build("cnn", num_classes=3, widths=(4, 6), batch_norm=True)
    batches = _batches(2, (8, 6, 6, 2))
    variables = _draw(model, batches[0])
    folded, _ = fold_batch_norm(model, variables, {}, batches)
    found, _ = reestimate(model, folded, {}, batches)
    jax.tree.map(np.testing.assert_array_equal, found, folded)


def test_bad_data_is_refused_with_the_norm():
    model, batches = Net(), _batches(2)
    variables = _draw(model, batches[0])
    with pytest.raises(ValueError, match="reestimate got no batches"):
        reestimate(model, variables, {}, [])
    batches[1] = batches[1].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN or infinity in the input of norm 'norm_0'"):
        reestimate(model, variables, {}, batches)


def test_a_model_without_norms_is_returned_as_it_is(caplog):
    model, x = nn.Dense(3), _batches(1)[0]
    variables = _draw(model, x)
    with caplog.at_level("WARNING", logger="absl"):
        assert reestimate(model, variables, {}, [x])[0] is variables
    assert "no batch norm" in caplog.text
