"""What model.apply takes, each public function takes: keywords, streams, dicts, lists, boxes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import deploy, quantize
from kdq.quantize import Inputs
from kdq.quantize.inputs import as_batches, as_inputs
from kdq.quantize.network import Weights
from kdq.quantize.ptq import chain
from kdq.quantize.ptq.errors import layer_errors

X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
MASK = np.array([1, 0, 1, 1, 0], np.float32)
RULES = quantize.uniform_rules(8, 8)


class Masked(nn.Module):
    """A mask by keyword, and noise of a stream of its own."""

    @nn.compact
    def __call__(self, x, *, mask=None, scale: str = "one", train: bool = False):
        x = x if mask is None else x * mask
        if self.has_rng("noise"):
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        x = nn.relu(nn.Dense(6, name="first")(x)) * {"one": 1.0, "two": 2.0}[scale]
        return nn.Dense(3, name="head")(x)


class Tree(nn.Module):
    """One argument that is a dict of a list; a named tuple would do as well."""

    @nn.compact
    def __call__(self, batch, *, train: bool = False):
        first, second = batch["pair"]
        return nn.Dense(3, name="a")(first) + nn.Dense(3, name="b")(second)


class Boxed(nn.Module):
    with_partitioning = staticmethod(nn.with_partitioning)

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        init = self.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(3, kernel_init=init, name="head")(x)


class Logical(Boxed):
    with_partitioning = staticmethod(nn.with_logical_partitioning)


CASES = {
    "mask by keyword": (Masked(), X, {"mask": MASK, "train": False}),
    "a mask, a string and a flag": (Masked(), X, {"mask": MASK, "scale": "two"}),
    "rngs": (Masked(), X, {"rngs": {"noise": jax.random.key(1)}}),
    "keywords of the batch": (Masked(), Inputs(X, mask=MASK), {}),
    "mutable": (Masked(), X, {"mutable": ["batch_stats"]}),
    "a dict of a list": (Tree(), {"pair": [X, 2 * X]}, {"train": False}),
    "a tuple": (Masked(), (X,), {}),
    "nn.with_partitioning": (Boxed(), X, {}),
    "nn.with_logical_partitioning": (Logical(), X, {}),
}


@functools.cache
def network(name):
    """`(model, variables, inputs, keywords, inputs with the keywords, float outputs)`."""
    model, inputs, kwargs = CASES[name]
    call = as_inputs(inputs)
    call = Inputs(*call.args, **call.kwargs, **kwargs)
    floats = {k: v for k, v in call.kwargs.items() if k != "mutable"}
    variables = model.init(jax.random.key(0), *call.args, **{
        k: v for k, v in floats.items() if k != "rngs"
    })  # fmt: skip
    return model, variables, inputs, kwargs, call, model.apply(variables, *call.args, **floats)


def close(outputs, expected, part=0.03):
    return np.abs(np.asarray(outputs) - expected).max() < part * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_listing_calibrating_simulating_lowering_and_tables(name, tmp_path):
    model, variables, inputs, kwargs, call, expected = network(name)
    layers = quantize.list_layers(model, variables, call)
    assert len(layers) == (1 if isinstance(model, Boxed) else 2)
    assert all(layer.macs == 5 * 3 for path, layer in layers.items() if path in ("a", "b"))
    qparams = quantize.calibrate(model, variables, RULES, [call])
    outputs = quantize.apply(model, variables, qparams, inputs, **kwargs)
    if "mutable" in kwargs:
        outputs, changed = outputs
        assert changed == {}
    assert close(outputs, expected)
    table = quantize.sqnr(model, variables, qparams, [call])
    error = np.square(np.asarray(outputs) - expected).sum()
    np.testing.assert_allclose(
        table.output, 10 * np.log10(np.square(expected).sum() / error), rtol=1e-3
    )
    summary = quantize.summary(model, variables, qparams, call)
    assert [row.path for row in summary.rows] == list(layers)
    integer = deploy.lower(model, Weights(variables=variables, qparams=qparams), inputs, **kwargs)
    if name != "keywords of the batch":
        assert close(integer(inputs), expected)
    masked = deploy.lower(model, Weights(variables=variables, qparams=qparams), inputs, **kwargs)(
        inputs
    )
    simulated = quantize.apply(model, integer.simulated(variables), qparams, inputs, **kwargs)
    simulated = simulated[0] if "mutable" in kwargs else simulated
    np.testing.assert_allclose(masked, simulated, atol=0.01 * np.abs(expected).max())


def test_scales_are_those_of_what_the_layers_get():
    """With the mask, with the noise, and of the dict's own entries: by hand."""
    model, variables, _, _, call, _ = network("mask by keyword")
    qparams = quantize.calibrate(model, variables, RULES, [call], check=False)
    scale = lambda path: float(qparams[path]["activations"].scale)
    np.testing.assert_allclose(scale("first"), np.abs(X * MASK).max() / 127, rtol=1e-5)
    model, variables, _, _, call, _ = network("a dict of a list")
    qparams = quantize.calibrate(model, variables, RULES, [call], check=False)
    np.testing.assert_allclose(scale("a"), np.abs(X).max() / 127, rtol=1e-5)
    np.testing.assert_allclose(scale("b"), 2 * np.abs(X).max() / 127, rtol=1e-5)


def test_each_batch_may_have_a_mask_of_its_own():
    model, variables = network("mask by keyword")[:2]
    batches = [Inputs(X, mask=0 * MASK), Inputs(10 * X, mask=np.eye(5, dtype=np.float32)[2])]
    qparams = quantize.calibrate(model, variables, RULES, batches, check=False)
    reach = 10 * np.abs(X[:, 2]).max()
    np.testing.assert_allclose(qparams["first"]["activations"].scale, reach / 127, rtol=1e-5)


def test_an_integer_model_takes_another_mask_with_its_inputs():
    model, variables, inputs, kwargs, _, _ = network("mask by keyword")
    qparams = quantize.calibrate(model, variables, RULES, [X], check=False)
    integer = deploy.lower(model, Weights(variables=variables, qparams=qparams), inputs, **kwargs)
    for mask in (MASK, 1 - MASK):
        expected = np.asarray(model.apply(variables, X, mask=mask))
        assert close(integer(Inputs(X, mask=mask)), expected)
    assert not close(integer(X), expected)  # with the mask that it was lowered with


METHODS = {
    "adaround": {"steps": 2},
    "brecq": {"steps": 2},
    "gptq": {},
    "teacher_guided": {"rounding_steps": 2, "checks": 1},
    "reestimate": {},
    "bias_correction": {},
    "fold_batch_norm": {},
    "equalize": {},
    "smooth": {},
    "awq": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mask by keyword", "rngs", "a dict of a list"])
def test_every_method_takes_them(method, name):
    model, variables, inputs, kwargs, call, expected = network(name)
    steps = [{"method": method, **METHODS[method]}]
    outcome = chain.run(steps, model, variables, RULES, [call] * 2)
    outputs = quantize.apply(model, outcome.variables, outcome.qparams, inputs, **kwargs)
    assert close(outputs, expected, 0.05)
    pair = (outcome.variables, outcome.qparams)
    errors = layer_errors(model, variables, pair, pair, [call])
    assert np.isfinite(errors.kl).all()


@pytest.mark.parametrize("name", ["nn.with_partitioning", "nn.with_logical_partitioning"])
@pytest.mark.parametrize("method", ["gptq", "equalize"])
def test_methods_give_boxes_back(method, name):
    model, variables, inputs, _, _, expected = network(name)
    outcome = chain.run([{"method": method}], model, variables, RULES, [inputs])
    box = outcome.variables["params"]["head"]["kernel"]
    assert box.names == (None, "model")
    assert close(quantize.apply(model, outcome.variables, outcome.qparams, inputs), expected)


def test_a_batch_without_examples_and_one_that_is_no_list_are_refused():
    model, variables = network("a tuple")[:2]
    with pytest.raises(
        ValueError, match="calibrate: batch 1 is empty: expected at least one example"
    ):
        quantize.calibrate(model, variables, RULES, [X, X[:0]])
    with pytest.raises(ValueError, match="sqnr got no batches: expected at least one"):
        quantize.sqnr(model, variables, {}, iter(()))
    with pytest.raises(
        TypeError, match=r"calibrate expected batches, got one dict: give \[batch\]"
    ):
        quantize.calibrate(model, variables, RULES, {"x": X})
    with pytest.raises(ValueError, match="expected inputs with at least one example"):
        quantize.list_layers(model, variables, X[:0])
    with pytest.raises(TypeError, match=r"the batch has \['mask'\] by keyword already"):
        quantize.apply(model, variables, {}, Inputs(X, mask=MASK), mask=MASK)


def test_inputs_are_a_pytree_of_arrays_and_flags_are_its_structure():
    inputs = Inputs(X, [1, "name"], mask=MASK, train=False)
    leaves, structure = jax.tree.flatten(inputs)
    assert [leaf.shape for leaf in leaves] == [X.shape, MASK.shape]
    assert structure == jax.tree.structure(Inputs(X, [1, "name"], mask=MASK, train=False))
    assert structure != jax.tree.structure(Inputs(X, [1, "name"], mask=MASK, train=True))
    double = jax.jit(lambda i: jax.tree.map(lambda a: 2 * a, i))(inputs)
    np.testing.assert_array_equal(double.args[0], 2 * X)
    assert (double.args[1], double.kwargs["train"]) == ([1, "name"], False)
    assert Inputs({"a": jnp.ones((3, 2)), "b": jnp.ones((1, 2)), "c": jnp.ones(3)}).rows == 3
    (batch,) = as_batches([(X, 0.5)], "test")
    assert (batch.args[1], batch.kwargs) == (0.5, {})
