"""Sensitivities against layers quantized by themselves, finite differences, whole Hessians."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import students
from scipy.special import log_softmax, softmax
from test_evaluate import expected

from kdq import quantize
from kdq.config import ConfigError, parse_bits
from kdq.quantize import MSE
from kdq.search import sensitivity
from kdq.search.evaluate import OBJECTIVES

CHOICES = ("W2A3", "W6A6", "W8A8")


@pytest.fixture(scope="module")
def case():
    """`(evaluator, teacher, batches)`; the last batch is padded, and choices differ by layer."""
    model, variables = students.student()
    batches = students.batches((6, 4), 6)
    choices = {"conv_0": CHOICES, "conv_1": CHOICES[:2], "head": CHOICES[1:]}
    calibration = [students.images(16, 0)]
    return (*students.evaluator(model, variables, choices, batches, calibration), batches)


def alone(case, path, bits):
    """Logits [examples, classes] with one layer quantized by its own calibration; "" is none."""
    evaluator, _, batches = case
    rules = quantize.uniform_rules(*parse_bits(bits), observer=MSE())
    calibration = [students.images(16, 0)]
    args = (evaluator.network, evaluator.variables)
    qparams = quantize.calibrate(*args, rules, calibration, check=False)
    own = {path: qparams[path]} if bits else {}
    found = [quantize.predict(*args, own, batch["image"])[batch["mask"] > 0] for batch in batches]
    return np.concatenate(found).astype(np.float64)


def objective(case, name, logits):
    """By hand, in float64."""
    _, teacher, batches = case
    labels = np.concatenate([batch["label"][batch["mask"] > 0] for batch in batches])
    log_q = log_softmax(logits, -1)
    if name == "kl":
        log_p = log_softmax(teacher.astype(np.float64), -1)
        return (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    if name == "loss":
        return -log_q[np.arange(len(labels)), labels].mean()
    if name == "error":
        return (logits.argmax(-1) != labels).mean()
    plain = alone(case, "", "")
    return np.square(logits - plain).sum() / np.square(plain).sum()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_differences_with_one_layer_quantized(case, name):
    table, base = sensitivity.measure(name, case[0])
    none = objective(case, name, alone(case, "", ""))
    assert base == pytest.approx(none, rel=1e-5, abs=1e-7)
    assert [len(row) for row in table] == [3, 2, 2]
    for row, (path, own) in zip(table, case[0].choices.items(), strict=True):
        for value, bits in zip(row, own, strict=True):
            direct = objective(case, name, alone(case, path, bits)) - none
            assert value == pytest.approx(direct, rel=1e-3, abs=2e-6), (path, bits)


@pytest.mark.slow
def test_what_two_layers_add_beyond_the_sum_of_each(case):
    evaluator = case[0]
    table, base = sensitivity.measure("kl", evaluator)
    found = sensitivity.pairs("kl", evaluator, table, base)
    sizes = [3, 2, 2]
    keys = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(3), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    assert found.keys() == keys
    for i, a, j, b in [(0, 0, 1, 0), (0, 0, 2, 0), (1, 0, 2, 1), (0, 2, 1, 1)]:
        value = lambda at: expected(case, tuple(at.get(layer, -1) for layer in range(3)))["kl"]
        direct = value({i: a, j: b}) - value({i: a}) - value({j: b}) + value({})
        assert found[i, a, j, b] == pytest.approx(direct, rel=1e-3, abs=3e-6)
    assert max(abs(value) for value in found.values()) > 1e-3  # they do something


# Fisher.


def on_the_way(case, path, bits, share):
    """Logits with the tensors of one layer so far from float to quantized."""
    evaluator, _, batches = case
    rules = quantize.uniform_rules(*parse_bits(bits), observer=MSE())
    args = (evaluator.network, evaluator.variables)
    qparams = quantize.calibrate(*args, rules, [students.images(16, 0)], check=False)
    move = lambda x, q: x + share * (quantize.fake_quantize(x, q) - x)
    found = [
        quantize.apply(*args, {path: qparams[path]}, b["image"], rounding=move) for b in batches
    ]
    whole = [x[b["mask"] > 0] for x, b in zip(found, batches, strict=True)]
    return np.concatenate(whole).astype(np.float64)


@pytest.mark.slow
def test_fisher_is_half_the_variance_of_the_change_of_the_logits(case):
    """Which is a central difference here, in place of forward-mode derivatives."""
    table, base = sensitivity.measure("fisher", case[0])
    assert base == 0
    p, step = softmax(alone(case, "", ""), -1), 2e-3
    for row, (path, own) in zip(table, case[0].choices.items(), strict=True):
        for value, bits in [(row[0], own[0])]:
            ends = [on_the_way(case, path, bits, sign * step) for sign in (1, -1)]
            change = (ends[0] - ends[1]) / (2 * step)
            mean = (p * change).sum(-1, keepdims=True)
            variance = (p * np.square(change - mean)).sum(-1).mean()
            assert value == pytest.approx(variance / 2, rel=0.02), (path, bits)


def test_fisher_is_the_divergence_from_the_student_to_second_order(case):
    table, _ = sensitivity.measure("fisher", case[0])
    log_p = log_softmax(alone(case, "", ""), -1)
    for row, (path, own) in zip(table, case[0].choices.items(), strict=True):
        for value, bits in zip(row, own, strict=True):
            if bits == "W2A3":  # not small
                continue
            log_q = log_softmax(alone(case, path, bits), -1)
            kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
            assert value == pytest.approx(kl, rel=0.05), (path, bits)


# Hessian.


class Smooth(nn.Module):
    """Two layers with a curved function between them."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name="last")(jnp.tanh(nn.Dense(4, name="first")(x)))


def hessian_of(variables, batch):
    """`{(path, operand): (its Hessian, variance of one probe of its trace)}`, of the masked loss.

    With respect to all four tensors at once; inputs moved example by example.
    """
    params = variables["params"]
    x, mask = jnp.asarray(batch["image"]), jnp.asarray(batch["mask"])
    names = [("first", "activations"), ("first", "weights")]
    names += [("last", "activations"), ("last", "weights")]
    shapes = [x.shape, (3, 4), (len(x), 4), (4, 3)]
    ends = np.cumsum([0, *(np.prod(shape) for shape in shapes)])

    def loss(flat):
        parts = [flat[a:b].reshape(s) for a, b, s in zip(ends, ends[1:], shapes, strict=False)]
        hidden = (x + parts[0]) @ (params["first"]["kernel"] + parts[1]) + params["first"]["bias"]
        logits = (jnp.tanh(hidden) + parts[2]) @ (params["last"]["kernel"] + parts[3])
        log_p = jax.nn.log_softmax(logits + params["last"]["bias"])
        each = -jnp.take_along_axis(log_p, jnp.asarray(batch["label"])[:, None], -1)[:, 0]
        return (mask * each).sum() / mask.sum()

    whole = np.asarray(jax.hessian(loss)(jnp.zeros(ends[-1])), np.float64)
    found = {}
    for name, a, b in zip(names, ends, ends[1:], strict=False):
        own = whole[a:b, a:b]
        rest = np.square(whole[a:b]).sum() - np.square(own).sum()
        off = np.square(own).sum() - np.square(np.diag(own)).sum()
        found[name] = own, 2 * off + rest
    return found


@pytest.mark.slow
def test_hessian_is_the_trace_times_the_squared_error():
    """Within what 256 random probes leave open; the padded example counts for nothing."""
    model, rng = Smooth(), np.random.default_rng(0)
    x = rng.normal(size=(6, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    batch = {
        "image": x,
        "label": np.array([0, 1, 2, 0, 1, 2], np.int32),
        "mask": np.array([1, 1, 1, 1, 1, 0], np.float32),
    }
    choices = {"first": ("W2", "A2"), "last": ("W2", "A2")}
    evaluator, _ = students.evaluator(model, variables, choices, [batch], [x], classes=3)
    probes = 256
    table, base = sensitivity.measure("hessian", evaluator, probes=probes)
    assert base == 0
    hidden = np.tanh(
        x @ variables["params"]["first"]["kernel"] + variables["params"]["first"]["bias"]
    )
    tensors = {
        ("first", "weights"): variables["params"]["first"]["kernel"],
        ("last", "weights"): variables["params"]["last"]["kernel"],
        ("first", "activations"): x[:5],
        ("last", "activations"): hidden[:5],
    }
    hessians = hessian_of(variables, batch)
    for row, path in zip(table, choices, strict=True):
        for value, (operand, bits) in zip(
            row, (("weights", (2, None)), ("activations", (None, 2))), strict=True
        ):
            rules = quantize.uniform_rules(*bits, observer=MSE())
            quantizer = quantize.calibrate(model, variables, rules, [x], check=False)[path][operand]
            tensor = jnp.asarray(tensors[path, operand])
            error = float(jnp.square(quantize.fake_quantize(tensor, quantizer) - tensor).sum())
            own, variance = hessians[path, operand]
            trace, size = np.trace(own), len(own)
            if operand == "activations":  # errors and numbers of one example
                error, size = error / 5, size // 6
            direct = 0.5 * trace / size * error
            sigma = 0.5 * np.sqrt(variance / probes) / size * error
            assert abs(value - direct) < 4 * sigma + 1e-6
            assert sigma < 0.3 * abs(direct)  # the test tells something


class Table(nn.Module):
    """A number for each token is the logit of the second class."""

    @nn.compact
    def __call__(self, tokens, train=False):
        score = nn.Embed(7, 1, name="score")(tokens)[:, 0]
        return jnp.concatenate([jnp.zeros_like(score), score], -1)


@pytest.mark.slow
def test_hessian_that_is_diagonal_is_exact_by_one_probe():
    model, rng = Table(), np.random.default_rng(0)
    tokens = rng.integers(0, 7, (20, 1)).astype(np.int32)
    variables = {"params": {"score": {"embedding": rng.normal(size=(7, 1)).astype(np.float32)}}}
    batch = {
        "image": tokens,
        "label": rng.integers(0, 2, 20).astype(np.int32),
        "mask": np.ones(20, np.float32),
    }
    choices = {"score": ("W2", "W3")}
    evaluator, _ = students.evaluator(model, variables, choices, [batch], [tokens], classes=2)
    found, _ = sensitivity.measure("hessian", evaluator, probes=1)
    table = variables["params"]["score"]["embedding"]
    p = 1 / (1 + np.exp(-table[tokens[:, 0], 0].astype(np.float64)))
    trace = (p * (1 - p)).mean()  # d²/dz² of the loss, over each token's examples
    for value, bits in zip(found[0], (2, 3), strict=True):
        rules = quantize.uniform_rules(bits, None, observer=MSE())
        own = quantize.calibrate(model, variables, rules, [tokens], check=False)["score"]["weights"]
        error = np.square(quantize.fake_quantize(jnp.asarray(table), own) - table).sum()
        assert value == pytest.approx(0.5 * trace / 7 * float(error), rel=1e-4)


def test_unknown_names_list_the_valid_ones(case):
    with pytest.raises(ConfigError, match=r"'fischer' \(did you mean 'fisher'\?\); valid: kl, .*"):
        sensitivity.measure("fischer", case[0])
    with pytest.raises(ConfigError, match=r"'hessian'.*; valid: kl, loss, error, noise"):
        sensitivity.pairs("hessian", case[0], [], 0.0)
