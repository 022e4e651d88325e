"""Scores of policies against float64 NumPy over the logits of each alone."""

import jax
import numpy as np
import pytest
import students
from compilations import count_compilations
from scipy.special import log_softmax

from kdq import quantize
from kdq.search import bank, evaluate
from kdq.search.objectives import OBJECTIVES, WORST, means

CHOICES = ("W2A8", "W3A8", "W8A8", "")


@pytest.fixture(scope="module")
def case():
    """`(evaluator, teacher, batches)`; the last batch is padded."""
    model, variables = students.student()
    calibration = [students.images(16, 0)]
    layers = quantize.list_layers(model, variables, calibration[0])
    batches = students.batches((6, 6, 4), 6)
    choices = dict.fromkeys(layers, CHOICES)
    return (*students.evaluator(model, variables, choices, batches, calibration), batches)


def logits_of(evaluator, policy, images):
    chosen = dict(zip(evaluator.choices, np.asarray(policy, np.int32), strict=True))
    qparams = bank.choose(evaluator.bank, chosen)
    found = quantize.predict(evaluator.network, evaluator.variables, qparams, images)
    return np.asarray(found, np.float64)


def expected(case, policy):
    """Over the examples that count, by hand."""
    evaluator, teacher, batches = case
    whole = [logits_of(evaluator, policy, b["image"])[b["mask"] > 0] for b in batches]
    logits = np.concatenate(whole)
    plain = lambda b: evaluator.network.module.apply(evaluator.variables, b["image"], train=False)
    unquantized = np.concatenate([np.asarray(plain(b), np.float64)[b["mask"] > 0] for b in batches])
    labels = np.concatenate([b["label"][b["mask"] > 0] for b in batches])
    log_p, log_q = log_softmax(teacher.astype(np.float64), -1), log_softmax(logits, -1)
    return {
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
        "loss": -log_q[np.arange(len(labels)), labels].mean(),
        "error": (logits.argmax(-1) != labels).mean(),
        "noise": np.square(logits - unquantized).sum() / np.square(unquantized).sum(),
    }


POLICIES = [(0, 0, 0), (1, 2, 0), (2, 2, 2), (-1, 0, -1), (3, 3, 1)]


def test_scores_by_hand(case):
    found = case[0](POLICIES)
    for i, policy in enumerate(POLICIES):
        for name, value in expected(case, policy).items():
            assert found[name][i] == pytest.approx(value, rel=2e-5, abs=1e-7), (policy, name)
    assert len({round(float(v), 6) for v in found["kl"]}) == len(POLICIES)


def test_padding_counts_for_nothing(case):
    evaluator, teacher, batches = case
    other = [dict(batch) for batch in batches]
    padded = other[-1]["mask"] == 0
    other[-1]["image"] = np.where(padded[:, None, None, None], 100.0, other[-1]["image"])
    other[-1]["label"] = np.where(padded, 4, other[-1]["label"]).astype(np.int32)
    held = evaluate.hold_out(evaluator.network, evaluator.variables, other, teacher)
    changed = evaluate.Evaluator(**{**vars(evaluator), "held": held})
    for name, scores in changed(POLICIES).items():
        np.testing.assert_allclose(scores, evaluator(POLICIES)[name], rtol=1e-6, err_msg=name)


def test_no_layer_quantized_has_no_noise(case):
    evaluator, _, _ = case
    found = evaluator([evaluator.float_policy, (3, 3, 3)])
    np.testing.assert_allclose(found["noise"], 0, atol=1e-9)
    for name, value in expected(case, (3, 3, 3)).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7)


def test_several_at_once_are_the_same(case):
    evaluator, _, _ = case
    rng = np.random.default_rng(0)
    policies = [tuple(rng.integers(-1, 4, 3).tolist()) for _ in range(11)]
    many = evaluate.Evaluator(**{**vars(evaluator), "at_once": 8, "evaluations": 0})
    one, found = evaluator(policies), many(policies)
    assert many.evaluations == 11
    for name in OBJECTIVES:
        np.testing.assert_allclose(found[name], one[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("at_once", [1, 4])
def test_one_compilation_for_all_policies(case, at_once):
    evaluator, teacher, _ = case
    batches = students.batches((7, 7), 7, seed=9)  # of a shape that was not there before
    held = evaluate.hold_out(evaluator.network, evaluator.variables, batches, teacher)
    other = evaluate.Evaluator(**{**vars(evaluator), "held": held, "at_once": at_once})
    with count_compilations("_evaluate") as compiled:
        for policies in ([(0, 0, 0)], POLICIES, [(-1, -1, -1)] * 9):
            other(policies)
    assert len(compiled) == 1


def test_what_is_not_finite_is_the_worst():
    sums = {name: np.array([1.0, np.nan, np.inf]) for name in ("kl", "loss", "error", "noise")}
    found = means([sums | {"signal": np.full(3, 2.0), "count": np.full(3, 4.0)}])
    np.testing.assert_array_equal(found["kl"], [0.25, WORST, WORST])
    np.testing.assert_array_equal(found["noise"], [0.5, WORST, WORST])


@pytest.mark.slow
def test_a_stack_with_attention_and_tables():
    """Of what was not made for this: scores are those of its own logits."""
    model, calibration = students.Unseen(), [students.tokens(6, 0)]
    variables = jax.jit(model.init)(jax.random.key(0), calibration[0])
    layers = quantize.list_layers(model, variables, calibration[0])
    batch = {
        "image": students.tokens(5, 1),
        "label": np.arange(5, dtype=np.int32),
        "mask": np.array([1, 1, 1, 1, 0], np.float32),
    }
    choices = dict.fromkeys(layers, students.CHOICES)
    built = students.evaluator(model, variables, choices, [batch], calibration, classes=11)
    rng = np.random.default_rng(0)
    policies = [tuple(rng.integers(-1, 5, len(layers)).tolist()) for _ in range(3)]
    found = built[0](policies)
    for i, policy in enumerate(policies):
        for name, value in expected((*built, [batch]), policy).items():
            assert found[name][i] == pytest.approx(value, rel=1e-4, abs=1e-6), (policy, name)
