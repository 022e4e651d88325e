"""Linear CKA: how alike two networks represent the same examples. On the host, in float64.

Of a bounded sample of examples, exact over all of it, and no average over batches. With few
examples for the number of features, CKA is large for unrelated features too: compare values of one
number of examples.
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike

# Rows of a product held at a time: bounds the memory whatever the examples and features.
_BLOCK = 256


def flatten(features: ArrayLike) -> np.ndarray:
    """[n, ...] -> [n, features] float64."""
    features = np.asarray(features, np.float64)
    if features.ndim < 2:
        raise ValueError(f"features must be [n, ...] with an axis of features: {features.shape}")
    return features.reshape(len(features), -1)


def global_average(features: ArrayLike) -> np.ndarray:
    """[n, ..., channels] -> [n, channels] float64: the mean over all positions."""
    features = np.asarray(features, np.float64)
    return flatten(features.mean(tuple(range(1, features.ndim - 1))))


def layer_cka(
    student_features: Mapping[str, ArrayLike],
    teacher_features: Mapping[str, ArrayLike],
    reduce: Callable[[ArrayLike], np.ndarray] = flatten,
) -> dict[tuple[str, str], float]:
    """Computes the linear centred kernel alignment of every two layers (arXiv:1905.00414).

    With the columns of X and Y centred, ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms, which is
    HSIC(XXᵀ, YYᵀ) / √(HSIC(XXᵀ, XXᵀ) HSIC(YYᵀ, YYᵀ)); each term is computed from the features or
    from the n×n kernels, whichever is cheaper, in blocks. Orthogonal maps and isotropic scaling of
    either set change nothing, other linear maps do.

    Features map each layer to [n, ...] float, of the same n ≥ 2 examples in the same order;
    `reduce` makes them [n, features]: `flatten` or `global_average`. Returns
    (student's layer, teacher's layer) -> CKA, the student's layers outermost: in [0, 1] up to
    rounding; nan if either set is constant over the examples or has a NaN. ValueError for different
    n, no axis of features, or no layers.
    """
    student, teacher = (
        {name: flatten(reduce(x)) for name, x in features.items()}
        for features in (student_features, teacher_features)
    )
    if not student or not teacher:
        raise ValueError(f"CKA needs layers of both, given {list(student)} and {list(teacher)}")
    counts = {f"student {name}": len(x) for name, x in student.items()}
    counts |= {f"teacher {name}": len(y) for name, y in teacher.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"CKA needs the same examples for every layer, given {counts}")
    if min(counts.values()) < 2:
        raise ValueError("CKA needs at least 2 examples")

    def centre(x: np.ndarray) -> np.ndarray:
        # About the first example a constant feature is exactly 0; its mean may be rounded.
        x = x - x[0]
        return x - x.mean(0)

    student, teacher = (
        {name: centre(x) for name, x in features.items()} for features in (student, teacher)
    )
    norms_s, norms_t = (
        {name: np.sqrt(_hsic(x, x)) for name, x in features.items()}
        for features in (student, teacher)
    )
    values = {}
    for s, t in itertools.product(student, teacher):
        scale = norms_s[s] * norms_t[t]
        cross = _hsic(student[s], teacher[t])
        values[s, t] = float("nan") if scale == 0 else float(cross / scale)
    return values


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """‖yᵀx‖² = Σ (xxᵀ)∘(yyᵀ) of centred features, by the form with fewer multiplications."""
    n, dx, dy = len(x), x.shape[1], y.shape[1]
    if dx * dy <= n * (dx + dy):
        return sum(np.sum((x[:, i : i + _BLOCK].T @ y) ** 2) for i in range(0, dx, _BLOCK))
    blocks = (slice(i, i + _BLOCK) for i in range(0, n, _BLOCK))
    return sum(np.sum((x[rows] @ x.T) * (y[rows] @ y.T)) for rows in blocks)
