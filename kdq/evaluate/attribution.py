"""Input attributions of a model, and how alike those of a student and its teacher are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from kdq.evaluate import metrics
from kdq.types import Array

# Images [batch, ...] float -> logits [batch, classes]; pure, each example independent of the rest.
LogitsFn = Callable[[Array], Array]
# (fn, images [batch, ...], classes [batch]) -> attributions, of the shape of the images.
Method = Callable[[LogitsFn, Array, Array], Array]


def gradient_times_input(fn: LogitsFn, images: Array, classes: Array) -> Array:
    """x ∂z_c(x)/∂x of the logit z_c of a class (arXiv:1605.01713, section 2).

    Args:
      fn: images -> logits [batch, classes].
      images: [batch, ...] float, in the units that `fn` takes.
      classes: [batch] int, the class explained.

    Returns:
      [batch, ...] in the logits' units.

    Raises:
      ValueError: other shapes, images that are no floats, or (outside jit) a class that is none.
    """
    images, classes = _checked(fn, images, classes)
    return images * _gradient(fn, images, classes)


def integrated_gradients(
    fn: LogitsFn,
    images: Array,
    classes: Array,
    baseline: ArrayLike = 0.0,
    steps: int = 32,
) -> Array:
    """(x − b) times the mean of ∂z_c/∂x over the straight path from b to x (arXiv:1703.01365).

    By the midpoint rule, at b + (k + ½)/steps (x − b). An example's attributions sum to
    z_c(x) − z_c(b), up to the error of that rule; not so of a fake-quantized model, whose gradient
    is the straight-through one of no path.

    Args:
      fn: images -> logits [batch, classes].
      images: [batch, ...] float, in the units that `fn` takes.
      classes: [batch] int, the class explained.
      baseline: b, broadcast to the images, in their units: 0 is the mean image if they are
        standardized.
      steps: points on the path, each one gradient of the batch, one after the other.

    Returns:
      [batch, ...] in the logits' units.

    Raises:
      ValueError: other shapes, images that are no floats, fewer than one step, or (outside jit)
        a class that is none.
    """
    images, classes = _checked(fn, images, classes)
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

    Args:
      a: [batch, ...] float.
      b: the same shape.

    Returns:
      (cosine, rank correlation), each [batch] float64 in [−1, 1]. nan where either is undefined:
      the cosine if a map is all zero, the correlation if one is constant, both if one has a NaN.

    Raises:
      ValueError: different shapes, or nothing but a batch axis.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"similarity: attributions must have one shape [batch, ...], given {a.shape}, {b.shape}"
        )
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    ranks = (rankdata(v, axis=1) for v in (a, b))
    return _cosine(a, b), _cosine(*(r - r.mean(1, keepdims=True) for r in ranks))


def attribution_similarity(
    student_fn: LogitsFn,
    teacher_fn: LogitsFn,
    images: ArrayLike,
    method: Method = integrated_gradients,
    batch_size: int = 128,
) -> dict[str, float]:
    """Whether a student looks where its teacher looks, for the class that the teacher predicts.

    Args:
      student_fn: images -> logits; jitted here, once.
      teacher_fn: likewise, of as many classes.
      images: [n, ...] float, in the units that both take.
      method: `gradient_times_input`, `integrated_gradients`, or a partial of it.
      batch_size: images a call; one shape compiles.

    Returns:
      "cosine" and "rank_correlation", the means of `similarity` over the examples where both are
      defined, and "undefined", the fraction of examples where they are not.

    Raises:
      ValueError: no image, images that are no floats, or models of different classes.
    """

    @jax.jit
    def attributions(images: Array) -> tuple[Array, Array]:
        shapes = [jax.eval_shape(fn, images).shape for fn in (student_fn, teacher_fn)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"attribution_similarity: logits of student and teacher have shapes {shapes}"
            )
        classes = jnp.argmax(teacher_fn(images), axis=-1)
        return method(student_fn, images, classes), method(teacher_fn, images, classes)

    images = np.asarray(images)
    cosine, correlation = metrics.in_batches(
        lambda batch: similarity(*attributions(batch)), images, batch_size=batch_size
    )
    defined = ~(np.isnan(cosine) | np.isnan(correlation))
    nothing = float("nan")
    return {
        "cosine": float(cosine[defined].mean()) if defined.any() else nothing,
        "rank_correlation": float(correlation[defined].mean()) if defined.any() else nothing,
        "undefined": float(1 - defined.mean()),
    }


def _gradient(fn: LogitsFn, images: Array, classes: Array) -> Array:
    """[batch, ...]: each example's gradient; their sum has them all, as none affects another."""

    def explained(images: Array) -> Array:
        return jnp.sum(jnp.take_along_axis(fn(images), classes[:, None], axis=-1))

    return jax.grad(explained)(images)


def _checked(fn: LogitsFn, images: Array, classes: Array) -> tuple[Array, Array]:
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


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / np.where(scale > 0, scale, np.nan)
