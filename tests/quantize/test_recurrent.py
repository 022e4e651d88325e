"""Cells of nn.RNN: weights, dynamic and static inputs, against loops in NumPy over the steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import deploy, quantize
from kdq.quantize import Percentile, QuantizationRule, TensorSpec
from kdq.quantize.network import Weights
from kdq.quantize.ptq.adaround import adaround
from kdq.quantize.ptq.gptq import gptq
from kdq.quantize.simulate import quantize_params

CELLS = {
    "LSTMCell": nn.LSTMCell,
    "OptimizedLSTMCell": nn.OptimizedLSTMCell,
    "GRUCell": nn.GRUCell,
    "MGUCell": nn.MGUCell,
    "SimpleCell": nn.SimpleCell,
}
X = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
WEIGHTS = TensorSpec(bits=8, granularity="per_channel")
sigmoid = lambda x: 1 / (1 + np.exp(-x))


class Net(nn.Module):
    cell: str

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(CELLS[self.cell](5, name="cell"), name="rnn")(x)
        return nn.Dense(2, name="head")(x[:, -1])


def rules(**inputs):
    spec = TensorSpec(bits=8, **inputs) if inputs else None
    return (QuantizationRule(path=".*", weights=WEIGHTS, activations=spec),)


def network(cell):
    """`(model, variables)`, drawn without compiling anything."""
    model, rng = Net(cell), np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    return model, jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(np.float32), shapes)


def run(model, variables, qparams):
    return np.asarray(jax.jit(lambda v, q: quantize.apply(model, v, q, X))(variables, qparams))


class Loop:
    """A cell in float64, step by step; `rounded` changes what each layer takes."""

    def __init__(self, params, rounded=lambda name, x: x):
        self.params, self.rounded = params, rounded
        self.taken = {}

    def dense(self, name, x):
        layer = self.params[name]
        self.taken.setdefault(name, []).append(x)
        x = self.rounded(name, x)
        return x @ np.float64(layer["kernel"]) + np.float64(layer.get("bias", 0))

    def run(self, cell, x):
        h = c = np.zeros((len(x), 5))
        d = self.dense
        for step in np.float64(x).swapaxes(0, 1):
            if "LSTM" in cell:
                i, f, g, o = (d(f"i{k}", step) + d(f"h{k}", h) for k in "ifgo")
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            elif cell == "GRUCell":
                r = sigmoid(d("ir", step) + d("hr", h))
                z = sigmoid(d("iz", step) + d("hz", h))
                h = (1 - z) * np.tanh(d("in", step) + r * d("hn", h)) + z * h
            elif cell == "MGUCell":
                f = sigmoid(d("if", step) + d("hf", h))
                h = (1 - f) * np.tanh(d("in", step) + f * d("hn", h)) + f * h
            else:
                h = np.tanh(d("i", step) + d("h", h))
        return h


def by_hand(cell, variables, rounded=lambda name, x: x):
    loop = Loop(variables["params"]["cell"], rounded)
    head = variables["params"]["head"]
    h = loop.run(cell, X)
    return h @ np.float64(head["kernel"]) + np.float64(head["bias"]), loop.taken


STATIC, DYNAMIC, NONE = {"signed": True}, {"dynamic": True}, {}
CASES = [
    pytest.param(cell, inputs, marks=() if default else pytest.mark.slow, id=f"{cell}-{name}")
    for cell in CELLS
    for name, inputs, default in (
        ("static", STATIC, True),
        ("dynamic", DYNAMIC, cell == "GRUCell"),
        ("weights", NONE, cell == "OptimizedLSTMCell"),
    )
]


@pytest.mark.parametrize(("cell", "inputs"), CASES)
def test_a_cell_computes_what_a_loop_that_rounds_does(cell, inputs):
    """A static scale is that of the largest over the whole sequence, as NumPy sees it."""
    model, variables = network(cell)
    plain, taken = by_hand(cell, variables)
    np.testing.assert_allclose(run(model, variables, {}), plain, atol=1e-5)
    qparams = quantize.calibrate(model, variables, rules(**inputs), [X], check=False)
    assert set(qparams) == {"head", *(f"cell/{name}" for name in taken)}
    scales = {name: np.abs(steps).max() / 127 for name, steps in taken.items()}
    if inputs is STATIC:
        for name, scale in scales.items():
            calibrated = float(qparams[f"cell/{name}"]["activations"].scale)
            np.testing.assert_allclose(calibrated, scale, rtol=1e-5)

    def by_scale(name, x):
        if inputs is NONE:
            return x
        scale = scales[name] if inputs is STATIC else np.abs(x).max() / 127 or 1.0
        return scale * np.clip(np.round(x / scale), -128, 127)

    weights = {path: {"weights": own["weights"]} for path, own in qparams.items()}
    on_grid = {"params": quantize_params(variables["params"], weights)}
    expected, _ = by_hand(cell, on_grid, by_scale)
    outputs = run(model, variables, {**qparams, "head": weights["head"]})
    # Where a number lies between two codes float32 may fall to the other one.
    assert np.abs(outputs - expected).max() < 0.3 * np.abs(plain - expected).max() + 1e-6
    assert np.abs(outputs - plain).max() < 0.03 * np.abs(plain).max()


def test_a_percentile_over_all_steps():
    """Its histogram has bins: to within one of them."""
    model, variables = network("SimpleCell")
    spec = {"signed": True, "observer": Percentile(90.0)}
    qparams = quantize.calibrate(model, variables, rules(**spec), [X], check=False)
    steps = np.ravel(by_hand("SimpleCell", variables)[1]["i"])
    reach = np.abs(np.percentile(steps, [5, 95], method="inverted_cdf")).max()
    scale = float(qparams["cell/i"]["activations"].scale)
    np.testing.assert_allclose(127 * scale, reach, rtol=0.02)


def test_multiplications_are_those_of_every_step():
    layers = quantize.list_layers(*network("SimpleCell"), X)
    assert layers["cell/i"].macs == 6 * 3 * 5
    assert layers["cell/h"].macs == 6 * 5 * 5
    assert layers["cell/h"].in_loop
    assert not layers["head"].in_loop


def test_both_directions_each_have_scales_of_their_own():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            forward, backward = nn.RNN(nn.SimpleCell(5)), nn.RNN(nn.SimpleCell(5))
            return nn.Bidirectional(forward, backward, name="both")(x)

    variables = jax.jit(Both().init)(jax.random.key(0), X)
    qparams = quantize.calibrate(Both(), variables, rules(signed=True), [X], check=False)
    inputs = [q["activations"].scale for path, q in qparams.items() if path.endswith("/i")]
    np.testing.assert_allclose(inputs, np.abs(X).max() / 127, rtol=1e-5)
    assert (len(inputs), len(qparams)) == (2, 4)
    outputs = np.asarray(quantize.apply(Both(), variables, qparams, X))
    expected = np.asarray(Both().apply(variables, X))
    assert np.abs(outputs - expected).max() < 0.04 * np.abs(expected).max()


def test_convolutions_of_a_cell():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.ConvLSTMCell(2, (3, 3), name="cell"), name="rnn")(x)

    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    variables = jax.jit(Net().init)(jax.random.key(0), x)
    qparams = quantize.calibrate(Net(), variables, rules(signed=True), [x], check=False)
    assert set(qparams) == {"cell/ih", "cell/hh"}
    np.testing.assert_allclose(qparams["cell/ih"]["activations"].scale, np.abs(x).max() / 127)
    outputs = np.asarray(quantize.apply(Net(), variables, qparams, x))
    expected = np.asarray(Net().apply(variables, x))
    assert np.abs(outputs - expected).max() < 0.03 * np.abs(expected).max()


def test_a_scan_and_a_vmap_of_ones_own_that_broadcast_the_weights():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                nn.SimpleCell,
                variable_broadcast="params",
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )(5, name="cell")
            x = scanned(jnp.zeros((len(x), 5)), x)[1]
            shared = nn.vmap(
                nn.Dense,
                in_axes=1,
                out_axes=1,
                variable_axes={"params": None},
                split_rngs={"params": False},
            )
            return shared(2, name="shared")(x)

    variables = jax.jit(Net().init)(jax.random.key(0), X)
    layers = quantize.list_layers(Net(), variables, X)
    assert layers["shared"].macs == 6 * 5 * 2
    qparams = quantize.calibrate(Net(), variables, rules(signed=True), [X], check=False)
    loop = Loop(jax.tree.map(np.asarray, variables["params"]["cell"]))
    loop.run("SimpleCell", X)
    hidden = np.stack(loop.taken["h"][1:])
    for path, reach in {"cell/i": np.abs(X).max(), "cell/h": np.abs(hidden).max()}.items():
        np.testing.assert_allclose(qparams[path]["activations"].scale, reach / 127, rtol=1e-5)
    seen = float(qparams["shared"]["activations"].scale)
    assert seen >= float(qparams["cell/h"]["activations"].scale) * (1 - 1e-6)
    outputs = np.asarray(quantize.apply(Net(), variables, qparams, X))
    expected = np.asarray(Net().apply(variables, X))
    assert np.abs(outputs - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.slow
def test_methods_and_tables_take_cells():
    """GPTQ's Hessian is of all steps, AdaRound leaves cells to the nearest, sqnr lists them."""
    model, variables = network("SimpleCell")
    three = TensorSpec(bits=3, granularity="per_channel")
    rule = (QuantizationRule(path=".*", weights=three, activations=TensorSpec(bits=8)),)
    qparams = quantize.calibrate(model, variables, rule, [X], check=False)
    expected = np.asarray(model.apply(variables, X))
    error = lambda v: np.square(np.asarray(quantize.apply(model, v, qparams, X)) - expected).sum()
    assert error(gptq(model, variables, qparams, [X])[0]) < error(variables)
    learned = adaround(model, variables, qparams, [X], steps=1)[0]
    np.testing.assert_allclose(
        learned["params"]["cell"]["i"]["kernel"],
        quantize.fake_quantize(
            variables["params"]["cell"]["i"]["kernel"], qparams["cell/i"]["weights"]
        ),
    )
    table = quantize.sqnr(model, variables, qparams, [X])
    assert all(np.isfinite(row.output) for row in table.layers.values())
    assert all(row.inputs["activations"] > 25 for row in table.layers.values())


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_integers_compute_what_the_simulation_does(cell):
    model, variables = network(cell)
    qparams = quantize.calibrate(model, variables, rules(signed=True), [X], check=False)
    integer = deploy.lower(model, Weights(variables=variables, qparams=qparams), X)
    simulated = quantize.apply(model, integer.simulated(variables), qparams, X)
    np.testing.assert_allclose(integer(X), simulated, atol=0.01 * float(jnp.abs(simulated).max()))
    assert not any("cell" in path for path in integer.in_float)


def test_a_locally_connected_layer():
    """Its product against NumPy: each position has a kernel of its own."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    model = nn.ConvLocal(4, (2,), padding="VALID")
    variables = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), x))
    layer = quantize.list_layers(model, variables, x)[""]
    assert (layer.kind, layer.macs) == ("ConvLocal", 4 * 4 * 2 * 3)
    qparams = quantize.calibrate(model, variables, rules(signed=True), [x], check=False)
    scale = np.abs(x).max() / 127
    xq = np.float64(scale) * np.round(x / scale)
    kernel = np.float64(variables["params"]["kernel"])  # [positions, channels × taps, features]
    steps = np.abs(kernel).max((0, 1)) / 127
    kernel = steps * np.round(kernel / steps)
    taps = np.stack([xq[:, :-1], xq[:, 1:]], -1)  # [batch, position, channel, tap]
    expected = np.einsum("bpi,pio->bpo", taps.reshape(2, 4, 6), kernel)
    outputs = np.asarray(quantize.apply(model, variables, qparams, x))
    expected += np.float64(variables["params"]["bias"])
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    integer = deploy.lower(model, Weights(variables=variables, qparams=qparams), x)
    np.testing.assert_allclose(integer(x), expected, atol=0.02)
