"""Scores of policies against float64 NumPy over the logits of each alone."""

import jax
import numpy as np
import pytest
import students
from compilations import count_compilations
from scipy.special import log_softmax

from kdq import quantize, tasks
from kdq.search import bank, evaluate, sensitivity
from kdq.search.evaluate import OBJECTIVES, WORST, compute_scores

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
    held = evaluate.hold_out(evaluator.network, evaluator.variables, students.TASK, other, teacher)
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
    held = evaluate.hold_out(
        evaluator.network, evaluator.variables, students.TASK, batches, teacher
    )
    other = evaluate.Evaluator(**{**vars(evaluator), "held": held, "at_once": at_once})
    with count_compilations("_evaluate") as compiled:
        for policies in ([(0, 0, 0)], POLICIES, [(-1, -1, -1)] * 9):
            other(policies)
    assert len(compiled) == 1


def test_what_is_not_finite_is_the_worst():
    values = np.array([1.0, np.nan, np.inf])
    sums = {"kl": {"kl": values}, "loss": {"loss": values}, "error": {"correct": values}}
    sums |= {"noise": {"noise": values, "signal": np.full(3, 2.0)}}
    found = compute_scores(students.TASK, [sums | {"count": {"count": np.full(3, 4.0)}}])
    np.testing.assert_array_equal(found["kl"], [0.25, WORST, WORST])
    np.testing.assert_array_equal(found["error"], [0.75, WORST, WORST])
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


def scores_of_task(task, label, fields):
    """Scores of float and quantized policies, and the outputs that they were computed from."""
    model, variables = students.student()
    batches = [batch | {"label": label[6 * i :][:6]} for i, batch in enumerate(fields["batches"])]
    calibration = [students.images(16, 0)]
    choices = dict.fromkeys(quantize.list_layers(model, variables, calibration[0]), CHOICES)
    args = model, variables, choices, batches, calibration
    evaluator, teacher = students.evaluator(*args, task=task)
    counted = lambda policy: np.concatenate(
        [logits_of(evaluator, policy, b["image"])[b["mask"] > 0] for b in batches]
    )
    policies = [(0, 1, 0), (2, 2, 2)]
    outputs = [counted(policy) for policy in policies]
    plain = np.concatenate([h.float_outputs[h.batch["mask"] > 0] for h in evaluator.held])
    return evaluator(policies), outputs, plain, teacher


@pytest.fixture(scope="module")
def padded():
    return {"batches": students.batches((6, 4), 6), "counted": np.r_[0:6, 6:10]}


def test_scores_of_regression_by_hand(padded):
    rng = np.random.default_rng(5)
    label = rng.normal(size=(12, 5)).astype(np.float32)
    std = (1.0, 2.0, 3.0, 0.5, 1.5)
    task = tasks.build("regression", mean=(0.5,) * 5, std=std)
    scores, outputs, plain, teacher = scores_of_task(task, label, padded)
    target = label[padded["counted"]]
    root = lambda error: np.sqrt(np.square(error * std).mean(0)).mean()
    for i, output in enumerate(outputs):
        standardized = (target - 0.5) / std
        assert scores["kl"][i] == pytest.approx(root(output - teacher), rel=1e-4)
        assert scores["error"][i] == pytest.approx(root(output - standardized), rel=1e-4)
        loss = np.square(output - standardized).mean()
        assert scores["loss"][i] == pytest.approx(loss, rel=1e-4)
        noise = np.square(output - plain).sum() / np.square(plain).sum()
        assert scores["noise"][i] == pytest.approx(noise, rel=1e-4)


def test_scores_of_multilabel_by_hand(padded):
    rng = np.random.default_rng(6)
    label = rng.integers(0, 2, (12, 5)).astype(np.float32)
    task = tasks.build("multilabel")
    scores, outputs, _, teacher = scores_of_task(task, label, padded)
    target = label[padded["counted"]]
    log = lambda logit: (-np.logaddexp(0, -logit), -np.logaddexp(0, logit))
    for i, output in enumerate(outputs):
        (p, not_p), (q, not_q) = log(teacher.astype(np.float64)), log(output)
        kl = np.exp(p) * (p - q) + np.exp(not_p) * (not_p - not_q)
        assert scores["kl"][i] == pytest.approx(kl.mean(), rel=1e-4)
        assert scores["loss"][i] == pytest.approx(-(target * q + (1 - target) * not_q).mean())
        hits, wrong = np.sum((output > 0) * target), np.sum((output > 0) != (target > 0))
        assert scores["error"][i] == pytest.approx(1 - 2 * hits / (2 * hits + wrong))


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_curvature_is_the_quadratic_form_of_the_distance(name):
    rng = np.random.default_rng(7)
    outputs, change = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(2))
    found = np.asarray(sensitivity.curvature(tasks.build(name), outputs, change))
    if name == "regression":
        expected = 2 * np.square(change).sum(-1)
    else:
        p = 1 / (1 + np.exp(-outputs.astype(np.float64)))
        expected = (p * (1 - p) * np.square(change)).mean(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_curvature_of_classes_is_that_of_the_divergence():
    """The closed form, against automatic differentiation of the task's divergence."""
    rng = np.random.default_rng(8)
    outputs, change = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(2))
    found = sensitivity.curvature(students.TASK, outputs, change)
    moved = lambda share: students.TASK.divergence(outputs + share * change, outputs)["kl"]
    second = jax.jacfwd(jax.jacfwd(moved))(0.0)
    np.testing.assert_allclose(found, second, rtol=1e-4)
