"""Attributions of a model's inputs, and how alike those of a student and its teacher are.

A model is a function `fn` from images [batch, ...] float, in its units, to logits [batch, classes];
attributions have the shape of the images and the unit of the logits. ValueError for other shapes,
images that are no floats, and (outside jit) a class that is none.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from kdq.evaluate import metrics
from kdq.types import Array

# Pure, each example independent of the rest. If it is a pytree too (`jax.tree_util.Partial` of a
# module's function, a flax struct that can be called), its leaves are data: one program serves all
# that differ in them only, see `bind`.
LogitsFn = Callable[[Array], Array]
# (fn, images [batch, ...], classes [batch]) -> attributions, of the shape of the images.
Method = Callable[[LogitsFn, Array, Array], Array]


def gradient_times_input(fn: LogitsFn, images: Array, classes: Array) -> Array:
    """x ∂z_c(x)/∂x of the logit z_c of the class explained (arXiv:1605.01713, section 2)."""
    images, classes = _check(fn, images, classes)
    return images * _gradient(fn, images, classes)


def integrated_gradients(
    fn: LogitsFn,
    images: Array,
    classes: Array,
    baseline: ArrayLike = 0.0,
    steps: int = 32,
) -> Array:
    """(x − b) times the mean of ∂z_c/∂x over the straight path from b to x (arXiv:1703.01365).

    By the midpoint rule, at b + (k + ½)/steps (x − b), one gradient of the batch after the other.
    An example's attributions sum to z_c(x) − z_c(b), up to the error of that rule; not so of a
    fake-quantized model, whose gradient is the straight-through one of no path. The baseline b is
    broadcast to the images: 0 is the mean image if they are standardized. ValueError for fewer
    steps than one.
    """
    images, classes = _check(fn, images, classes)
    if steps < 1:
        raise ValueError(f"integrated_gradients: steps must be at least 1, given {steps}")
    baseline = jnp.asarray(baseline, images.dtype)
    try:
        difference = images - jnp.broadcast_to(baseline, images.shape)
    except ValueError as error:
        raise ValueError(
            f"integrated_gradients: baseline {baseline.shape} for images {images.shape}"
        ) from error

    def add(k: Array, total: Array) -> Array:
        point = baseline + (k + 0.5) / steps * difference
        return total + _gradient(fn, point.astype(images.dtype), classes)

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros_like(images))
    return difference * total / steps


def similarity(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and Spearman's rank correlation of two attributions of each example, on the host.

    Of a and b [batch, ...], each result is [batch] float64 in [−1, 1]. nan where either is
    undefined: the cosine if a map is all zero, the correlation if one is constant, both if one has
    a NaN. ValueError for different shapes, or nothing but a batch axis.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"similarity: attributions must have one shape [batch, ...], given {a.shape}, {b.shape}"
        )
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    # Takes most of a second to import, which --help should not wait for.
    from scipy.stats import rankdata  # noqa: PLC0415

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return np.sum(a * b, axis=1) / np.where(scale > 0, scale, np.nan)

    ranks = (rankdata(v, axis=1) for v in (a, b))
    return cosine(a, b), cosine(*(r - r.mean(1, keepdims=True) for r in ranks))


class Explanation:
    """Attributions of a teacher's predictions, to compare any number of students with.

    Args:
      teacher_fn: jitted here.
      images: [n, ...] float, at least one.
      method: `gradient_times_input`, `integrated_gradients`, or a partial of it.
      batch_size: images a call; one shape compiles.
    """

    def __init__(
        self,
        teacher_fn: LogitsFn,
        images: ArrayLike,
        method: Method = integrated_gradients,
        batch_size: int = 128,
    ) -> None:
        self._images, self._method, self._batch_size = np.asarray(images), method, batch_size
        explain = bind(_explain, teacher_fn, method=method)
        self.logits, self.attributions = metrics.in_batches(
            explain, self._images, batch_size=batch_size
        )

    def similarity(self, student_fn: LogitsFn) -> dict[str, float]:
        """Compares where a student (jitted here) and the teacher look, for the teacher's class.

        Returns "cosine" and "rank_correlation", the means of `similarity` over the examples where
        both are defined, and "undefined", the fraction of examples where they are not. ValueError
        for a student of other classes.
        """
        explain = bind(_explain, student_fn, method=self._method)
        _, attributions = metrics.in_batches(
            explain, self._images, self.logits, batch_size=self._batch_size
        )
        cosine, correlation = similarity(attributions, self.attributions)
        defined = ~(np.isnan(cosine) | np.isnan(correlation))
        return {
            "cosine": float(cosine[defined].mean()) if defined.any() else math.nan,
            "rank_correlation": float(correlation[defined].mean()) if defined.any() else math.nan,
            "undefined": float(1 - defined.mean()),
        }


def bind(run: Callable[..., Any], fn: LogitsFn, **static: Any) -> Callable[..., Any]:
    """`functools.partial(run, fn, **static)`, compiled as seldom as `fn` allows.

    Args:
      run: made by `jax.jit`, with the names of `static` static; takes `fn` first.
      fn: if a pytree, an argument of `run`, whose program then serves all of this structure.
        Otherwise (a plain function, a closure) it gets a program of its own, with what it closes
        over as constants; both are dropped together.
      **static: hashable.
    """
    if jax.tree_util.all_leaves([fn]):
        # As a static argument of `run` itself, jit's cache would keep it and its weights for good.
        return jax.jit(functools.partial(run.__wrapped__, fn, **static))
    return functools.partial(run, fn, **static)


@functools.partial(jax.jit, static_argnames="method")
def _explain(
    fn: LogitsFn, images: Array, teacher_logits: Array | None = None, *, method: Method
) -> tuple[Array, Array]:
    """Returns logits and the attributions of the predicted class, or of a teacher's."""
    logits = fn(images)
    explained = logits if teacher_logits is None else teacher_logits
    if logits.shape != explained.shape:
        shapes = [logits.shape, explained.shape]
        raise ValueError(f"Explanation: logits of student and teacher have shapes {shapes}")
    return logits, method(fn, images, jnp.argmax(explained, axis=-1))


def _gradient(fn: LogitsFn, images: Array, classes: Array) -> Array:
    """[batch, ...]: each example's gradient; their sum has them all, as none affects another."""
    return jax.grad(lambda x: jnp.sum(jnp.take_along_axis(fn(x), classes[:, None], axis=-1)))(
        images
    )


def _check(fn: LogitsFn, images: Array, classes: Array) -> tuple[Array, Array]:
    images, classes = jnp.asarray(images), jnp.asarray(classes)
    if images.ndim < 2 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floats [batch, ...], given {images.dtype} {images.shape}")
    logits = jax.eval_shape(fn, images)
    if classes.shape != images.shape[:1] or logits.shape[:-1] != classes.shape:
        raise ValueError(
            f"images {images.shape} need logits [batch, classes] and classes [batch], "
            f"given {logits.shape} and {classes.shape}"
        )
    # A traced class has no value yet; take_along_axis would not complain about a wrong one.
    if not isinstance(classes, jax.core.Tracer):
        metrics.class_labels(logits, classes)
    return images, classes
