"""Losses of unlike shapes and masks, whole and in parts: each mean is over what counts for it."""

import math

import flax.linen as nn
import numpy as np
import pytest

from kdq import config
from kdq.distill import term
from kdq.distill.capture import Outputs
from kdq.distill.teacher import Model
from kdq.quantize.network import Weights
from kdq.schema import Compute
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import train_step
from kdq.train.training import Training, create_state

BATCH = TOKENS = 4  # equal: a sum of [batch] and [batch, positions] would go through
WIDTH, CLASSES, WEIGHT, RATE = 3, 5, 0.7, 0.1
HINT = {"loss": "hint", "weight": WEIGHT, "student": "head", "teacher": "head", "adapter": "none"}


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(CLASSES, name="head")(tokens)


def make_batch(masked):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32),
        "label": rng.integers(0, CLASSES, (BATCH, TOKENS)).astype(np.int32),
    }
    if masked:
        # In two parts, (0, 2) and (1, 3), 7 and 2 tokens count, and 2 and 1 examples.
        lengths = np.int32([[4], [2], [3], [4]])
        batch["token_mask"] = (np.arange(TOKENS) < lengths).astype(np.float32)
        batch["mask"] = np.float32([1, 1, 1, 0])
    return batch


def make_kernels():
    rng = np.random.default_rng(1)
    return [rng.normal(size=(WIDTH, CLASSES)).astype(np.float32) for _ in range(2)]


def oracle(batch):
    """Loss and gradient of the student's kernel in float64: mean CE + WEIGHT · mean hint."""
    student, teacher = (np.float64(kernel) for kernel in make_kernels())
    inputs = np.float64(batch["image"])
    examples = np.float64(batch.get("mask", np.ones(BATCH)))
    tokens = np.float64(batch.get("token_mask", np.ones((BATCH, TOKENS)))) * examples[:, None]
    logits, reference = inputs @ student, inputs @ teacher
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    target = np.eye(CLASSES)[batch["label"]]
    entropy = -(target * np.log(p)).sum(-1)
    hint = ((logits - reference) ** 2).mean((1, 2))
    loss = (tokens * entropy).sum() / tokens.sum() + WEIGHT * (examples @ hint) / examples.sum()
    d_logits = tokens[..., None] * (p - target) / tokens.sum()
    d_hint = 2 * (logits - reference) / (TOKENS * CLASSES)
    d_logits += WEIGHT * examples[:, None, None] * d_hint / examples.sum()
    return loss, np.einsum("btw,btc->wc", inputs, d_logits)


@pytest.mark.parametrize("masked", [False, True])
def test_a_term_of_examples_beside_a_loss_of_positions(masked):
    batch = make_batch(masked)
    logits, reference = (batch["image"] @ kernel for kernel in make_kernels())
    outputs = [Outputs(logits=x, features={"head": x}) for x in (logits, reference)]
    objective = Objective(terms=(term.build("hint", HINT, "hint"),))
    loss, totals, _ = objective(*outputs, batch)
    np.testing.assert_allclose(loss, oracle(batch)[0], rtol=1e-5)
    assert all(total.shape == () for total in totals.values())
    counts = objective.counts(batch)
    assert counts == (
        {"task_loss": 9, "hint_loss": 3} if masked else {"task_loss": 16, "hint_loss": 4}
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_parts_of_a_batch_add_up_to_its_gradient(masked, parts):
    """One step of SGD in closed form, where parts differ in how many tokens and examples count."""
    batch, settings = make_batch(masked), config.Optimizer(name="sgd", warmup=0.0)
    student, teacher = (
        Weights(
            variables={"params": {"head": {"kernel": kernel, "bias": np.zeros(CLASSES, "f")}}},
            qparams={},
        )
        for kernel in make_kernels()
    )
    training = Training(
        network=Tagger(),
        optimizer=make_optimizer(settings),
        objective=Objective(terms=(term.build("hint", HINT, "hint"),)),
        teacher=Model(Tagger(), teacher),
        compute=Compute(accumulate=parts),
    )
    state = create_state(student, settings, seed=0, steps=10, learning_rate=RATE)
    state, metrics = train_step(training, state, batch)
    loss, gradient = oracle(batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    # Nesterov's first step is 1.9 gradients.
    rate = 1.9 * RATE * 0.5 * (1 + math.cos(math.pi * 0.5 / 10))
    moved = (student.variables["params"]["head"]["kernel"] - state.params["head"]["kernel"]) / rate
    np.testing.assert_allclose(moved, gradient, rtol=1e-4, atol=1e-5)
    assert metrics["correct"].count == (9 if masked else 16)
    assert metrics["hint_loss"].count == (3 if masked else 4)


def test_values_of_another_shape_are_refused():
    batch = make_batch(masked=True)
    logits = batch["image"] @ make_kernels()[0]
    built = term.build("kl", {"loss": "kl"}, "kl")
    inputs = built.look(Outputs(logits=logits), Outputs(logits=logits), batch, np.ones((4, 4)))
    wrong = inputs._replace(student=(logits[:, 0],), teacher=(logits[:, 0],), weights=np.ones(4))
    assert built({}, {}, wrong, None)[0].shape == (4,)
    features = term.build("hint", HINT, "hint")
    tokens = Outputs(logits=logits, features={"head": logits})
    look = features.look(tokens, tokens, batch, np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"'hint' \(hint\): expected values \(3,\), got \(4,\)"):
        features({}, {}, look, None)
