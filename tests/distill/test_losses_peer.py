"""The losses on logits and their gradients against torchdistill in float64, where it has them.

Each peer takes {module path: {"output": tensor}} of student and teacher. Its DIST+ is left out: it
adds the correlation of features to the loss, so that training would lower it.
"""

import jax
import numpy as np
import pytest
from logit_oracles import logits

from kdq.distill import losses

pytest.importorskip("torchdistill")
import torch
from torchdistill.losses.mid_level import DISTLoss, KDLoss, LogitStdKDLoss

PATHS = [".", "output", ".", "output"]
LABELS = np.array([3, 0, 9, 3, 5, 1])


def _peer(module, student, teacher, labels=None):
    """(value, gradient to the student)."""
    student, teacher = (torch.tensor(v, dtype=torch.float64) for v in (student, teacher))
    student.requires_grad_()
    outputs = ({".": {"output": v}} for v in (student, teacher))
    value = module(*outputs, None if labels is None else torch.tensor(labels))
    value.backward()
    return value.item(), student.grad.numpy()


def _assert_equal(loss, peer):
    """`loss(student)` and its gradient are (value, gradient) of the peer."""
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits()[0])
    np.testing.assert_allclose(value, peer[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, peer[1], rtol=0, atol=1e-5 * np.abs(peer[1]).max())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl(temperature):
    student, teacher = logits()
    # With alpha = 0 or without labels the peer leaves out its own formula's factor T².
    value, gradient = _peer(KDLoss(*PATHS, temperature, alpha=0.0), student, teacher)
    _assert_equal(
        lambda s: losses.kl(s, teacher, temperature, reduction="mean"),
        (temperature**2 * value, temperature**2 * gradient),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_kl_and_cross_entropy(label_smoothing):
    student, teacher = logits()
    module = KDLoss(*PATHS, 4.0, alpha=0.3, label_smoothing=label_smoothing)

    def loss(student):
        task = losses.cross_entropy(student, LABELS, label_smoothing, reduction="mean")
        return 0.3 * task + 0.7 * losses.kl(student, teacher, 4.0, reduction="mean")

    _assert_equal(loss, _peer(module, student, teacher, LABELS))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_dist(temperature):
    student, teacher = logits()
    module = DISTLoss(*PATHS, beta=2.0, gamma=0.7, tau=temperature)
    _assert_equal(
        lambda s: losses.dist(s, teacher, temperature, 2.0, 0.7, reduction="mean"),
        _peer(module, student, teacher),
    )


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_standardized_kl(temperature):
    student, teacher = logits()
    # The peer divides by classes - 1 in the deviation, as its authors' code and not their paper.
    ours = temperature * np.sqrt(10 / 9)
    # As above it has no T² without labels.
    value, gradient = _peer(LogitStdKDLoss(*PATHS, temperature, alpha=0.0), student, teacher)
    _assert_equal(
        lambda s: losses.standardized_kl(s, teacher, ours, reduction="mean"),
        (ours**2 * value, ours**2 * gradient),
    )
