"""Integer models against the simulated ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, network

from kdq import quantize
from kdq.deploy import lower
from kdq.deploy.flow import run as flow
from kdq.deploy.integer_layer import IntegerLayer
from kdq.quantize import QuantizationRule, TensorSpec, grid
from kdq.quantize.network import Weights

DEFAULT = [("pooled", (2, 8))]  # the others are slow
CASES = [
    pytest.param(name, bits, marks=() if (name, bits) in DEFAULT else pytest.mark.slow)
    for name in NETWORKS
    for bits in [(8, 8), (4, 8), (4, 4), (2, 8)]
]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_does_as_the_simulated_model(name, bits):
    model, variables, images = network(name)
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(*bits), [images], check=False
    )
    simulated = quantize.apply(model, variables, qparams, images)
    lowered = lower(model, Weights(variables=variables, qparams=qparams), images)
    outputs = lowered(images)
    layers = [path for path in lowered.in_float if path in qparams]
    assert not layers
    if "resnet" in name or "pooled" in name:
        assert not lowered.in_float  # every norm became part of a layer
    # A code may come to lie on the other side of a half; most examples have none that does.
    same = np.isclose(outputs, simulated, atol=1e-4 * float(np.abs(simulated).max())).all(-1)
    assert same.mean() >= 0.5
    assert (outputs.argmax(-1) == simulated.argmax(-1)).mean() >= 0.95


def _codes_of_inputs(model, variables, qparams, images):
    """What the simulation rounds the inputs of layers to: `{PATH/OPERAND: codes}`."""
    found = {}

    def record(call):
        if call.path in qparams and call.method == "__call__":
            for operand, x in call.operands.items():
                quantizer = qparams[call.path][operand]
                found[f"{call.path}/{operand}"] = grid.to_codes(x, quantizer) - quantizer.qmin
        return call.run()

    weights = quantize.Weights(variables=variables, qparams=qparams)
    quantize.Network(model).run(weights, images, record)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_codes_are_those_of_the_simulation_with_its_biases(name, bits):
    model, variables, images = network(name, offsets=0.5)
    rng = np.random.default_rng(1)
    drawn = lambda keys, a: (
        jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype) if "bias" in str(keys[-1]) else a
    )
    variables = jax.tree_util.tree_map_with_path(drawn, variables)
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(*bits), [images], check=False
    )
    integer = lower(model, Weights(variables=variables, qparams=qparams), images)
    rounded = integer.simulated(variables)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), variables, rounded)
    assert max(jax.tree.leaves(moved)) > 0
    again = lower(model, Weights(variables=rounded, qparams=qparams), images).simulated(rounded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), rounded, again
    )
    made = {}
    integer.apply(images, integers=made)
    expected = _codes_of_inputs(model, rounded, qparams, images)
    assert set(expected) < set(made)
    for key, codes in expected.items():
        apart = np.abs(np.asarray(made[key], np.int32) - codes)
        assert apart.max() <= 1, key
        assert (apart > 0).mean() <= 0.005, key


def test_lower_itself_rounds_biases_to_the_steps_of_the_sums():
    """To whole multiples of (input scale × weight scale), by NumPy; and that is all it changes."""
    model, variables, images = network("mlp")
    rng = np.random.default_rng(1)
    drawn = lambda keys, a: (
        jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype) if "bias" in str(keys[-1]) else a
    )
    variables = jax.tree_util.tree_map_with_path(drawn, variables)
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(2, 4), [images], check=False
    )
    integer = lower(model, Weights(variables=variables, qparams=qparams), images)
    simulated = integer.simulated(variables)
    for path, quantizers in qparams.items():
        bias = np.float64(variables["params"][path]["bias"])
        scales = [np.float64(quantizers[name].scale) for name in ("weights", "activations")]
        step = scales[0].ravel() * scales[1]
        expected = step * np.round(bias / step)
        np.testing.assert_allclose(simulated["params"][path]["bias"], expected, rtol=1e-5)
        assert simulated["params"][path]["kernel"] is variables["params"][path]["kernel"]
    outputs = np.asarray(integer(images))
    error = lambda v: np.abs(outputs - np.asarray(quantize.apply(model, v, qparams, images))).max()
    assert error(simulated) < 1e-4
    assert error(variables) > 0.05  # another network


@pytest.mark.parametrize("name", ["pooled", pytest.param("resnet", marks=pytest.mark.slow)])
def test_offsets_of_norms_become_biases(name):
    model, variables, images = network(name, offsets=0.5)
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(8, 8), [images], check=False
    )
    simulated = quantize.apply(model, variables, qparams, images)
    without = network(name)[1]
    error, change = (
        float(np.abs(outputs - simulated).max())
        for outputs in (
            lower(model, Weights(variables=variables, qparams=qparams), images)(images),
            quantize.apply(model, without, qparams, images),
        )
    )
    assert error < 0.02 * float(np.abs(simulated).max())
    assert change > 10 * error  # what it would be without them


def test_keeps_no_float_weight():
    model, variables, images = network("resnet", offsets=0.5)
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(4, 8), [images], check=False
    )
    lowered = lower(model, Weights(variables=variables, qparams=qparams), images)
    for keys, array in jax.tree_util.tree_leaves_with_path(lowered.variables["params"]):
        name = jax.tree_util.keystr(keys)
        assert "kernel" not in name
        if name.endswith(".codes"):
            assert array.dtype == jnp.int4, name
    layer = lowered.variables["params"]["stem"]["_lowered"]
    assert isinstance(layer, IntegerLayer)
    assert layer.bias.dtype == layer.weight_sum.dtype == jnp.int32


@pytest.mark.slow
def test_what_stays_in_float_is_listed_with_the_reason():
    model, variables, images = network("mlp")
    whole = TensorSpec(bits=8)
    rules = (
        QuantizationRule(path="dense_0", weights=whole),
        QuantizationRule(
            path="dense_1",
            weights=TensorSpec(bits=4, granularity="per_group", group_size=8),
            activations=whole,
        ),
        QuantizationRule(path="head", weights=TensorSpec(format="fp8_e4m3"), activations=whole),
    )
    qparams = quantize.calibrate(model, variables, rules, [images], check=False)
    lowered = lower(model, Weights(variables=variables, qparams=qparams), images)
    assert lowered.in_float == {
        "dense_0": "no rule quantizes its activations",
        "dense_1": "its weight has scales in groups along its inputs, which can't share a sum",
        "head": "its weight has a number format, not integers",
    }
    simulated = quantize.apply(model, variables, qparams, images)
    np.testing.assert_allclose(lowered(images), simulated, atol=1e-5)


class Large(nn.Module):
    """A bias that is too large for the steps of its sums."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, bias_init=nn.initializers.constant(1e9), name="dense")(x)


def test_sums_that_do_not_fit_stay_in_float():
    x = jnp.full((4, 3), 1e-3)
    model = Large()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(8, 8), [x], check=False)
    lowered = lower(model, Weights(variables=variables, qparams=qparams), x)
    assert "more than 32 bits hold" in lowered.in_float["dense"]
    np.testing.assert_allclose(lowered(x), quantize.apply(model, variables, qparams, x), rtol=1e-6)


class Used(nn.Module):
    """A layer whose output goes to a norm and elsewhere."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(4, name="dense")(x)
        return y + nn.BatchNorm(use_running_average=True, name="norm")(y)


@pytest.mark.slow
def test_a_norm_behind_an_output_that_is_also_used_elsewhere_stays():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    model = Used()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    variables = {**variables, "batch_stats": {"norm": {"mean": jnp.ones(4), "var": jnp.ones(4)}}}
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(8, 8), [x], check=False)
    lowered = lower(model, Weights(variables=variables, qparams=qparams), x)
    assert list(lowered.in_float) == ["norm"]
    np.testing.assert_allclose(
        lowered(x), quantize.apply(model, variables, qparams, x), rtol=1e-4, atol=1e-5
    )


def test_an_unknown_layer_is_an_error():
    model, variables, images = network("mlp")
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(8, 8), [images], check=False
    )
    with pytest.raises(KeyError, match="nowhere"):
        lower(model, Weights(variables=variables, qparams={"nowhere": qparams["head"]}), images)


def _floats_between(jaxpr):
    """Operations that make an image of floats after the first codes have been made."""
    found, codes = [], False
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        codes = codes or out.dtype == jnp.uint8
        if codes and out.ndim == 4 and out.shape[0] > 1 and out.dtype == jnp.float32:
            found.append(eqn.primitive.name)
    return found


@pytest.mark.slow
def test_by_fixed_point_numbers_a_residual_network_is_integers_from_end_to_end():
    model, variables, images = network("resnet", offsets=0.5)
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(8, 8), [images], check=False
    )
    by_float = lower(model, Weights(variables=variables, qparams=qparams), images)
    by_fixed = lower(model, Weights(variables=variables, qparams=qparams), images, fixed_point=True)
    flat = lambda lowered: jax.make_jaxpr(
        lambda x: lowered.apply(x, unroll=True)
    )(images).jaxpr  # fmt: skip
    assert "kdq_to_float" in _floats_between(flat(by_float))
    assert _floats_between(flat(by_fixed)) == []
    expected, found = _codes(by_float, images), _codes(by_fixed, images)
    assert expected.keys() == found.keys()
    apart = {name: np.abs(codes.astype(int) - found[name]) for name, codes in expected.items()}
    # The two roundings; later layers get other codes by then.
    first = np.concatenate([a.ravel() for name, a in apart.items() if "stage_0" in name])
    assert first.max() == 1
    assert 0 < (first > 0).mean() < 0.02
    outputs, wanted = np.asarray(by_fixed(images)), np.asarray(by_float(images))
    assert np.abs(outputs - wanted).max() < 0.02 * np.abs(wanted).max()


def _codes(lowered, images):
    """What each layer takes."""

    @jax.jit
    def run(lowered, images):
        made = {}
        lowered.apply(images, unroll=True, integers=made)
        return {name: array for name, array in made.items() if array.dtype == jnp.uint8}

    return jax.tree.map(np.asarray, run(lowered, images))


def test_many_sums_are_shortened_before_they_are_added():
    rng = np.random.default_rng(0)
    total = rng.integers(-(2**29), 2**29, (4, 7, 7, 3)).astype(np.int32)
    sums = flow.Accumulator(jnp.asarray(total), jnp.float32(1e-6), 2**29)
    short, scale, largest = flow.shorten(sums, 49)
    assert 49 * largest < 2**31
    assert np.abs(short).max() <= largest
    found = np.asarray(short).sum((1, 2), dtype=np.int32) * np.float64(scale)
    np.testing.assert_allclose(found, total.sum((1, 2), dtype=np.int64) * 1e-6, rtol=1e-5, atol=0.5)


@pytest.mark.parametrize("operation", [lambda x: x / 49.0, lambda x: x * 0.7])
def test_a_mean_has_the_same_scale_compiled_or_not(operation):
    """XLA would multiply by the reciprocal."""
    scales = np.random.default_rng(0).uniform(1e-4, 1e-2, 4096).astype(np.float32)
    (eqn,) = jax.make_jaxpr(operation)(scales).eqns
    total = jnp.ones(4096, jnp.int32)

    @jax.jit
    def compiled(scales):
        sums = flow.Accumulator(total, scales, 1)
        return flow._run_on_sums(eqn, [sums, eqn.invars[1].val], False).scale

    np.testing.assert_array_equal(compiled(scales), operation(scales))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        return nn.MultiHeadDotProductAttention(1, name="attention")(x)


def test_products_whose_sums_may_not_fit_are_left_in_float():
    """255 * 255 * 33,025 is the last that int32 holds; attention adds up all positions."""
    model, rng = Attention(), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(8, 8), [x])
    inputs = {n: jax.ShapeDtypeStruct((1, n, 4), jnp.float32) for n in (6, 33_025, 33_026)}
    integers = {
        n: lower(model, Weights(variables=variables, qparams=qparams), shape)
        for n, shape in inputs.items()
    }
    assert integers[6].in_float == integers[33_025].in_float
    (added,) = integers[33_026].in_float.keys() - integers[6].in_float.keys()
    assert "33026 products" in integers[33_026].in_float[added]
    # One that was lowered for short inputs says so of longer ones.
    jax.eval_shape(integers[6], inputs[33_025])
    with pytest.raises(ValueError, match="sums of 33026 products reach"):
        jax.eval_shape(integers[6], inputs[33_026])
