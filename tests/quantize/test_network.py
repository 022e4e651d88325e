"""Networks: modules as people write them are called alike, and their prediction is found."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import quantize
from kdq.distill import capture
from kdq.quantize import Inputs, Network, Weights, as_network
from kdq.quantize.ptq import chain
from kdq.quantize.ptq.errors import layer_errors

X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
RULES = quantize.uniform_rules(8, 8)
KEYS = {"dropout": jax.random.key(2)}


class Net(nn.Module):
    """Batch norm and dropout, told in the subclass's way."""

    def compute(self, x, train):
        x = nn.Dense(6, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="head")(x)


class Train(Net):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        return self.compute(x, train)


class TrainWithoutDefault(Net):
    @nn.compact
    def __call__(self, x, train):
        return self.compute(x, train)


class TrainsByDefault(Net):
    @nn.compact
    def __call__(self, x, is_training: bool = True):
        return self.compute(x, is_training)


class Deterministic(Net):
    @nn.compact
    def __call__(self, x, deterministic: bool = False):
        return self.compute(x, not deterministic)


class RunningAverage(Net):
    """Two arguments for one thing."""

    @nn.compact
    def __call__(self, x, use_running_average, deterministic):
        assert use_running_average == deterministic
        return self.compute(x, not deterministic)


class Merged(Net):
    """Flax's own way: a field or an argument, and not both."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        return self.compute(x, not deterministic)


class Neither(Net):
    @nn.compact
    def __call__(self, x):
        return self.compute(x, False)


TOLD = [Train(), TrainWithoutDefault(), TrainsByDefault(), Deterministic(), RunningAverage()]
TOLD += [Merged()]
EXPECTED = Train()
VARIABLES = jax.jit(EXPECTED.init)(jax.random.key(0), X)
name_of = lambda module: type(module).__name__


@pytest.mark.parametrize("module", [*TOLD, Merged(deterministic=True), Neither()], ids=name_of)
def test_every_function_evaluates_without_being_told(module):
    drawn = jax.jit(as_network(module).init)(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, drawn, VARIABLES)
    outputs = quantize.predict(module, VARIABLES, {}, X)
    expected = jax.jit(EXPECTED.apply)(VARIABLES, X)
    np.testing.assert_array_equal(outputs, expected)
    assert list(quantize.list_layers(module, VARIABLES, X)) == ["first", "head"]
    qparams = quantize.calibrate(module, VARIABLES, RULES, [X])
    same = quantize.calibrate(EXPECTED, VARIABLES, RULES, [X])
    jax.tree.map(np.testing.assert_array_equal, qparams, same)
    assert quantize.sqnr(module, VARIABLES, qparams, [X]).output > 20


@pytest.mark.parametrize("module", TOLD, ids=name_of)
def test_train_reaches_the_module_by_its_own_argument(module):
    run = lambda module: quantize.apply(
        module, VARIABLES, {}, X, train=True, mutable=["batch_stats"], rngs=KEYS
    )
    (outputs, changed), (expected, stats) = run(module), run(EXPECTED)
    jax.tree.map(np.testing.assert_array_equal, (outputs, changed), (expected, stats))
    moved = changed["batch_stats"]["norm"]["mean"] - VARIABLES["batch_stats"]["norm"]["mean"]
    assert np.abs(moved).max() > 0


def test_a_module_that_takes_neither_ignores_train():
    outputs = quantize.apply(Neither(), VARIABLES, {}, X, train=True)
    np.testing.assert_array_equal(outputs, quantize.apply(Neither(), VARIABLES, {}, X))


def test_what_the_call_or_the_network_says_goes_before():
    train = Network(Train(), {"train": True})
    expected = quantize.apply(Train(), VARIABLES, {}, X, train=True, mutable=True, rngs=KEYS)[0]
    options = {"mutable": True, "rngs": KEYS}
    for network, inputs in (
        (train, X),
        (Train(), Inputs(X, train=True)),
        (TrainWithoutDefault(), (X, True)),
    ):
        outputs, _ = quantize.apply(network, VARIABLES, {}, inputs, **options)
        np.testing.assert_array_equal(outputs, expected)
    with pytest.raises(TypeError, match=r"the batch has \['train'\] by keyword already"):
        quantize.apply(train, VARIABLES, {}, Inputs(X, train=True), **options)


def test_a_network_is_hashable_and_compiles_once():
    network = Network(Train(), {"train": False})
    assert network == Network(Train(), {"train": False})
    assert network != Network(Train())
    assert hash(network) == hash(Network(Train(), {"train": False}))
    assert as_network(network) is network
    with pytest.raises(TypeError, match=r"expected a flax.linen.Module, got 3"):
        as_network(3)


class Two(nn.Module):
    """Two inputs, one of them optional, and Flax's attention, which is told as `deterministic`."""

    @nn.compact
    def __call__(self, x, weights=None, *, deterministic):
        x = x if weights is None else x * weights
        x = nn.Dense(4, name="in")(x)[:, None]
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, name="attention")
        return nn.Dense(3, name="head")(attention(x, deterministic=deterministic)[:, 0])


def test_two_inputs_dropout_and_a_whole_chain():
    network, inputs = Network(Two()), (X, np.abs(X))
    variables = jax.jit(network.init)(jax.random.key(0), inputs)
    assert "attention/qk" in quantize.list_layers(network, variables, inputs)
    steps = [{"method": "gptq"}, {"method": "bias_correction"}]
    outcome = chain.run(steps, network, variables, RULES, [inputs])
    weights = Weights(variables=outcome.variables, qparams=outcome.qparams)
    outputs = jax.jit(lambda weights, inputs: network.apply(weights, inputs))(weights, inputs)
    expected = Two().apply(variables, *inputs, deterministic=True)
    np.testing.assert_allclose(outputs, expected, atol=0.03 * np.abs(expected).max())
    by_keyword = network.apply(weights, Inputs(inputs[0], weights=inputs[1]))
    np.testing.assert_allclose(by_keyword, outputs, rtol=1e-5, atol=1e-6)


class Output(flax.struct.PyTreeNode):
    hidden: Any
    logits: Any


class Pair(NamedTuple):
    hidden: Any
    scores: Any


FORMS = {
    "dict": (lambda h, y: {"hidden": h, "logits": y}, None),
    "dataclass": (Output, None),
    "tuple": (lambda h, y: (y, h), None),
    "dict by name": (lambda h, y: {"hidden": h, "scores": y}, "scores"),
    "named tuple by name": (Pair, "scores"),
    "tuple by position": (lambda h, y: (h, y), 1),
    "array": (lambda h, y: y, None),
}


class Formed(nn.Module):
    form: str

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(6, name="first")(x)
        return FORMS[self.form][0](hidden, nn.Dense(3, name="head")(nn.relu(hidden)))


@pytest.mark.parametrize("form", FORMS)
def test_the_prediction_is_the_part_that_is_named_or_known(form):
    network = Network(Formed(form), prediction=FORMS[form][1])
    variables = jax.jit(Formed("array").init)(jax.random.key(0), X)
    outputs, _ = capture.run(network, variables, {}, X, ("first",))
    np.testing.assert_array_equal(outputs.logits, Formed("array").apply(variables, X))
    assert outputs.features["first"].shape == (8, 6)
    qparams = quantize.calibrate(network, variables, RULES, [X])
    pair = (variables, qparams)
    expected = layer_errors(Formed("array"), variables, pair, pair, [X])
    np.testing.assert_allclose(
        layer_errors(network, variables, pair, pair, [X]).kl, expected.kl, rtol=1e-5
    )


def test_a_prediction_that_is_not_there_is_refused():
    outputs = {"hidden": jnp.ones(3), "scores": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"expected one of \['hidden', 'scores'\]"):
        Network(Formed("dict")).select_prediction(outputs)
    with pytest.raises(ValueError, match=r"prediction='logits': expected one of"):
        Network(Formed("dict"), prediction="logits").select_prediction(outputs)
    with pytest.raises(ValueError, match="the outputs are one array"):
        Network(Formed("array"), prediction=1).select_prediction(outputs["scores"])
