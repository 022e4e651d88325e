"""Points near a teacher's decision boundary, and whether a student agrees there.

Models are functions from images [n, ...] float, in their units, to logits of at least 2 classes,
jitted here; `batch_size` images a call, so that one shape compiles. ValueError for no image, images
that are no floats, and a teacher of one class or that predicts a NaN.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from kdq.evaluate import metrics
from kdq.evaluate.attribution import LogitsFn, bind
from kdq.types import Array


def draw_pairs(classes: ArrayLike, pairs: int, seed: int = 0) -> np.ndarray:
    """Pairs of examples of different classes, each possible one equally likely.

    Of classes [n] int, drawn with replacement: [pairs, 2] int, indices of examples; (i, j) and
    (j, i) are two pairs. ValueError for classes of another shape, all the same, or no pair.
    """
    classes = np.asarray(classes)
    if classes.ndim != 1 or pairs < 1:
        raise ValueError(f"draw_pairs: given classes {classes.shape} and {pairs} pairs")
    _, inverse, count = np.unique(classes, return_inverse=True, return_counts=True)
    if len(count) < 2:
        raise ValueError("draw_pairs: all examples are of one class, there is no boundary")
    rng = np.random.default_rng(seed)
    others = len(classes) - count[inverse]
    left = rng.choice(len(classes), size=pairs, p=others / others.sum())
    # In the order of classes, those of other classes are around the block of the example's class.
    order, block = np.argsort(inverse, kind="stable"), inverse[left]
    position = rng.integers(0, others[left])
    position += np.where(position >= (np.cumsum(count) - count)[block], count[block], 0)
    return np.stack([left, order[position]], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes:
    """Points among images and what a teacher predicts there, to try any number of students on."""

    at: Callable[[np.ndarray], np.ndarray]  # rows [batch] int -> images [batch, ...]
    teacher_logits: np.ndarray  # [rows, classes], none NaN
    batch_size: int  # rows a call; one shape compiles

    def agreement(self, student_fn: LogitsFn) -> float:
        """Fraction in [0, 1] of the points where a student predicts what the teacher predicts.

        ValueError for a student of other classes than the teacher's.
        """
        student = bind(_logits_like, student_fn)
        logits = metrics.in_batches(
            lambda rows, teacher: student(self.at(rows), teacher),
            np.arange(len(self.teacher_logits)),
            self.teacher_logits,
            batch_size=self.batch_size,
        )
        # A student's NaN agrees with nothing.
        return float(np.mean(metrics.correct(logits, self.teacher_logits.argmax(-1))))


def probe_images(teacher_fn: LogitsFn, images: ArrayLike, batch_size: int = 256) -> Probes:
    """The images themselves as points."""
    images = _floats(images)
    return _probes(bind(_logits_like, teacher_fn), images.__getitem__, len(images), batch_size)


def probe_paths(
    teacher_fn: LogitsFn,
    images: ArrayLike,
    pairs: int = 256,
    seed: int = 0,
    points: int = 9,
    batch_size: int = 256,
) -> Probes:
    """Returns points on straight paths between images that the teacher gives different classes.

    The `points` of each of `pairs` paths are x + k/(points + 1) (x' − x) for k = 1 … points:
    without the ends, and across at least one boundary of the teacher. The pairs are those of
    `draw_pairs`, of `seed`. ValueError also for a teacher that predicts one class only, and for no
    pair or point.
    """
    images = _floats(images)
    if points < 1:
        raise ValueError(f"probe_paths: points must be at least 1, given {points}")
    # No batch of either pass is smaller, so one shape compiles.
    batch_size = min(batch_size, len(images), max(pairs, 1) * points)
    teacher = bind(_logits_like, teacher_fn)
    ends = _probes(teacher, images.__getitem__, len(images), batch_size)
    classes = ends.teacher_logits.argmax(-1)
    ends = np.repeat(draw_pairs(classes, pairs, seed), points, axis=0)
    fractions = np.tile(np.arange(1, points + 1) / (points + 1), pairs).astype(images.dtype)

    def at(rows: np.ndarray) -> np.ndarray:  # a batch at a time: all of them may be many
        t = fractions[rows].reshape(-1, *[1] * (images.ndim - 1))
        return (1 - t) * images[ends[rows, 0]] + t * images[ends[rows, 1]]

    return _probes(teacher, at, len(ends), batch_size)


def adversarial_images(
    fn: LogitsFn, images: ArrayLike, epsilon: float, batch_size: int = 256
) -> np.ndarray:
    """Returns images after a small step that makes a model less sure of its own prediction.

    The step is x + ε sign(∂L/∂x), the fast gradient sign of arXiv:1412.6572, with L the
    cross-entropy of the model with its own prediction on x. It is not clipped to a range of pixels,
    which this function cannot know of standardized images. A pixel whose gradient is 0 or NaN
    stays. Agreement there is to be compared with that on the images themselves, ε = 0. ValueError
    for an ε that is negative or not finite.
    """
    images = _floats(images)
    if not 0 <= epsilon < np.inf:
        raise ValueError(f"adversarial_images: epsilon must be in [0, inf), given {epsilon}")
    step = bind(_step, fn)
    return metrics.in_batches(lambda batch: step(batch, epsilon), images, batch_size=batch_size)


@jax.jit
def _step(fn: LogitsFn, images: Array, epsilon: float) -> Array:
    def margin(images: Array) -> Array:
        """Σ of how far the other classes are ahead; each loss is its softplus.

        So their gradients have one sign, but where the softmax saturates, only this one is not
        rounded to 0.
        """
        logits = fn(images)
        predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
        rest = jax.nn.logsumexp(logits, axis=-1, where=~predicted)
        return jnp.sum(rest - jnp.sum(logits, axis=-1, where=predicted))

    sign = jnp.sign(jax.grad(margin)(images))
    return images + epsilon * jnp.where(jnp.isnan(sign), 0, sign)


@jax.jit
def _logits_like(fn: LogitsFn, images: Array, teacher_logits: Array | None = None) -> Array:
    """A model's logits, of the shape of a teacher's if there are any."""
    logits = fn(images)
    expected = logits.shape if teacher_logits is None else teacher_logits.shape
    if logits.shape != expected or logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            "student_fn and teacher_fn must return logits [batch, classes] of as many classes, "
            f"at least 2, given {logits.shape} and {expected}"
        )
    return logits


def _probes(
    teacher: Callable[[ArrayLike], Array],
    at: Callable[[np.ndarray], np.ndarray],
    count: int,
    batch_size: int,
) -> Probes:
    logits = metrics.in_batches(
        lambda rows: teacher(at(rows)), np.arange(count), batch_size=batch_size
    )
    if np.isnan(logits).any():
        raise ValueError("the teacher's logits hold a NaN: such a teacher predicts nothing")
    return Probes(at=at, teacher_logits=logits, batch_size=batch_size)


def _floats(images: ArrayLike) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim < 2 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floats [n, ...], given {images.dtype} {images.shape}")
    return images
