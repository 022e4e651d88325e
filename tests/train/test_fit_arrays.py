"""Training on arrays: that it learns, from whom, and what of quantizers it trains."""

import jax
import numpy as np
import pytest
from host_scores import kl_divergence

from kdq import models, quantize
from kdq.arms import kl, recipe
from kdq.fields import ConfigError
from kdq.quantize.network import Weights
from kdq.train.arrays import fit_arrays
from kdq.train.step import NonFiniteError

MODEL = models.build("mlp", num_classes=3, widths=(8,))
CENTRES = np.array([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
LABELS = np.arange(96) % 3
INPUTS = (CENTRES[LABELS] + np.random.default_rng(0).normal(0, 0.3, (96, 4))).astype(np.float32)


def fit(labels=LABELS, **fields):
    fields = {"epochs": 8, "learning_rate": 2e-2, "batch_size": 16, **fields}
    return fit_arrays(MODEL, INPUTS, labels, **fields)


def logits(weights):
    return np.asarray(quantize.predict(MODEL, weights.variables, weights.qparams, INPUTS))


@pytest.fixture(scope="module")
def trained():
    return fit()


def test_it_learns_and_the_seed_decides_all(trained):
    assert (logits(trained).argmax(1) == LABELS).mean() > 0.95
    assert jax.tree.all(jax.tree.map(np.array_equal, trained.variables, fit().variables))
    other = fit(seed=1)
    assert not np.allclose(logits(trained), logits(other))


def test_the_teacher_teaches_what_labels_do_not(trained):
    said, shuffled = logits(trained), np.random.default_rng(1).permutation(LABELS)
    by_labels = fit(shuffled)
    taught = fit(shuffled, teacher_logits=said, recipe=kl(alpha=1.0, temperature=2.0))
    distance = [kl_divergence(said, logits(one)).mean() for one in (by_labels, taught)]
    assert distance[1] < distance[0] / 10
    assert (logits(taught).argmax(1) == LABELS).mean() > 0.95


@pytest.mark.slow
def test_quantizers_go_on_from_where_they_are_and_fixed_scales_stay(trained):
    rules = quantize.uniform_rules(2, 8)
    qparams = quantize.calibrate(MODEL, trained.variables, rules, [INPUTS])
    start = Weights(variables=trained.variables, qparams=qparams)
    found = fit(start=start, epochs=2, fixed_scales=("dense_0/activations",))
    scale = lambda of, path, name: np.asarray(of[path][name].scale)
    assert found.qparams.keys() == qparams.keys()
    for path, name, moves in (
        ("dense_0", "activations", False),
        ("dense_0", "weights", True),
        ("head", "activations", True),
    ):
        same = np.array_equal(scale(found.qparams, path, name), scale(qparams, path, name))
        assert same != moves, f"{path}/{name}"
    assert (logits(found).argmax(1) == LABELS).mean() > 0.95
    # The start is the caller's still: a step donates what it gets.
    assert np.isfinite(logits(start)).all()


def test_every_example_is_seen_once_an_epoch():
    """One step of the whole set, in any order, is one step of gradient on its mean."""
    one = fit(epochs=1, batch_size=96)
    start = fit_arrays(MODEL, INPUTS, LABELS, epochs=0, learning_rate=1.0)
    back = np.arange(96)[::-1]
    other = fit_arrays(
        MODEL,
        INPUTS[back],
        LABELS[back],
        epochs=1,
        learning_rate=2e-2,
        batch_size=96,
        start=Weights(variables=start.variables, qparams={}),
    )
    np.testing.assert_allclose(logits(one), logits(other), rtol=1e-3, atol=1e-4)
    assert np.abs(logits(one) - logits(start)).max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_logits": np.zeros((96, 3))}, "teacher_logits and recipe"),
        ({"recipe": kl(0.5, 1.0)}, "teacher_logits and recipe"),
        ({"labels": LABELS[:-1]}, "'label': 95"),
        ({"batch_size": 97}, "want 97 examples or more"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        fit(**fields)


def test_a_recipe_of_an_unknown_loss_is_refused():
    unknown = {"task": 0.0, "terms": {"mine": {"loss": "klx"}}}
    with pytest.raises(ConfigError, match=r"recipe\.terms\.mine\.loss"):
        fit(teacher_logits=np.zeros((96, 3)), recipe=unknown)


def test_nan_stops_it_and_names_the_step():
    said = np.zeros((96, 3), np.float32)
    said[:, 0] = np.nan
    with pytest.raises(NonFiniteError, match="step 1"):
        fit(teacher_logits=said, recipe=kl(alpha=0.5, temperature=1.0))


def test_it_learns_real_targets_and_follows_a_teacher_of_them():
    """Outputs are of standardized targets: the line that is the truth is found, from either."""
    targets = (INPUTS @ np.float32([[3.0], [-1.0], [2.0], [0.5]]) + 40.0)[:, 0]
    standard = (targets - targets.mean()) / targets.std()
    line = models.build("mlp", num_classes=1, widths=())
    fields = {"epochs": 100, "learning_rate": 0.3, "batch_size": 16, "task": "regression"}
    outputs = lambda weights: np.asarray(quantize.predict(line, weights.variables, {}, INPUTS))
    by_targets = fit_arrays(line, INPUTS, targets, **fields)
    np.testing.assert_allclose(outputs(by_targets)[:, 0], standard, atol=1e-3)
    said = {"teacher_logits": -standard[:, None], "recipe": recipe("squared_error", 1.0)}
    taught = fit_arrays(line, INPUTS, targets, **said, **fields)
    np.testing.assert_allclose(outputs(taught)[:, 0], -standard, atol=1e-3)


@pytest.mark.parametrize(
    ("task", "labels"), [("classification", LABELS * 1.0), ("regression", LABELS)]
)
def test_labels_of_another_task_are_refused(task, labels):
    with pytest.raises(ConfigError, match=f"task {task}: expected"):
        fit(labels, task=task)
