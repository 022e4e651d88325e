"""Linear CKA: how alike two networks represent the same examples. On the host, in float64.

`linear_cka` and `layer_cka` take features held in memory; `StreamingCka` takes batches and holds
only covariances. Both are exact over all examples, neither is an average over batches. With few
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


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Linear centred kernel alignment of two sets of features (arXiv:1905.00414).

    With the columns of X and Y centred, ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms, which is
    HSIC(XXᵀ, YYᵀ) / √(HSIC(XXᵀ, XXᵀ) HSIC(YYᵀ, YYᵀ)); each term is computed from the features or
    from the n×n kernels, whichever is cheaper, in blocks. Orthogonal maps and isotropic scaling of
    either set change nothing, other linear maps do.

    Args:
      x: [n, ...] float, flattened to [n, features].
      y: [n, ...] float of the same n examples in the same order.

    Returns:
      In [0, 1] up to rounding; nan if either set is constant over the examples or has a NaN.

    Raises:
      ValueError: different n, fewer than 2 examples, or no axis of features.
    """
    return layer_cka({"x": x}, {"y": y})["x", "y"]


def layer_cka(
    student_features: Mapping[str, ArrayLike],
    teacher_features: Mapping[str, ArrayLike],
    reduce: Callable[[ArrayLike], np.ndarray] = flatten,
) -> dict[tuple[str, str], float]:
    """Linear CKA of every layer of a student with every layer of its teacher.

    Args:
      student_features: layer -> [n, ...] float.
      teacher_features: layer -> [n, ...] float of the same n examples in the same order.
      reduce: features of a layer -> [n, features]: `flatten` or `global_average`.

    Returns:
      (student's layer, teacher's layer) -> CKA as in `linear_cka`, the student's layers outermost.

    Raises:
      ValueError: as `linear_cka`, or no layers.
    """
    student, teacher = _reduced(student_features, teacher_features, reduce)
    if _examples(student, teacher) < 2:
        raise ValueError("CKA needs at least 2 examples")
    student = {name: _centred(x) for name, x in student.items()}
    teacher = {name: _centred(y) for name, y in teacher.items()}
    own_s = {name: _hsic(x, x) for name, x in student.items()}
    own_t = {name: _hsic(y, y) for name, y in teacher.items()}
    return {
        (s, t): _ratio(_hsic(student[s], teacher[t]), own_s[s], own_t[t])
        for s, t in itertools.product(student, teacher)
    }


class StreamingCka:
    """`layer_cka` of batches of features, of which it holds only sums of products.

    Args:
      reduce: features of a layer [n, ...] -> [n, features]: `global_average` or `flatten`.
      max_features: largest number of features of a layer. A layer holds features² float64, and
        each pair of layers the product of theirs; give wider layers to `layer_cka`, on a
        subsample of the examples, whose memory does not grow with features².
    """

    def __init__(
        self,
        reduce: Callable[[ArrayLike], np.ndarray] = global_average,
        max_features: int = 2048,
    ) -> None:
        self._reduce, self._max_features = reduce, max_features
        self._examples = 0
        # Role and layer -> [features], and pairs of these -> [features, features].
        self._first: dict[tuple[str, str], np.ndarray] = {}
        self._sums: dict[tuple[str, str], np.ndarray] = {}
        self._products: dict[tuple[tuple[str, str], tuple[str, str]], np.ndarray] = {}

    def update(
        self,
        student_features: Mapping[str, ArrayLike],
        teacher_features: Mapping[str, ArrayLike],
    ) -> None:
        """Adds a batch of any size, with its padding removed.

        Args:
          student_features: layer -> [batch, ...] float.
          teacher_features: layer -> [batch, ...] float of the same examples in the same order.

        Raises:
          ValueError: layers or numbers of features other than in the first batch, different
            numbers of examples, no layers, or more than `max_features` features.
        """
        student, teacher = _reduced(student_features, teacher_features, self._reduce)
        examples = _examples(student, teacher)
        features = {("student", name): x for name, x in student.items()}
        features |= {("teacher", name): y for name, y in teacher.items()}
        if examples == 0:
            return
        if not self._first:
            self._start(features)
        self._check(features)
        # Sums of products lose digits to a large mean; about an example, there is none left.
        features = {key: x - self._first[key] for key, x in features.items()}
        for key, x in features.items():
            self._sums[key] += x.sum(0)
        for (a, b), product in self._products.items():
            product += features[a].T @ features[b]
        self._examples += examples

    def result(self) -> dict[tuple[str, str], float]:
        """(student's layer, teacher's layer) -> CKA over all examples so far, as `layer_cka`.

        Raises:
          ValueError: fewer than 2 examples.
        """
        if self._examples < 2:
            raise ValueError("CKA needs at least 2 examples")
        norms = {
            (a, b): np.sum((p - np.outer(self._sums[a], self._sums[b] / self._examples)) ** 2)
            for (a, b), p in self._products.items()
        }
        return {
            (a[1], b[1]): _ratio(norm, norms[a, a], norms[b, b])
            for (a, b), norm in norms.items()
            if a[0] != b[0]
        }

    def _start(self, features: Mapping[tuple[str, str], np.ndarray]) -> None:
        for key, x in features.items():
            if x.shape[1] > self._max_features:
                raise ValueError(
                    f"StreamingCka: {' '.join(key)} has {x.shape[1]} features, more than "
                    f"max_features={self._max_features}; pool them, or use layer_cka"
                )
        self._first = {key: x[0].copy() for key, x in features.items()}
        self._sums = {key: np.zeros(x.shape[1]) for key, x in features.items()}
        student = [key for key in features if key[0] == "student"]
        teacher = [key for key in features if key[0] == "teacher"]
        pairs = [(key, key) for key in features] + list(itertools.product(student, teacher))
        self._products = {
            (a, b): np.zeros((features[a].shape[1], features[b].shape[1])) for a, b in pairs
        }

    def _check(self, features: Mapping[tuple[str, str], np.ndarray]) -> None:
        given = {key: x.shape[1] for key, x in features.items()}
        expected = {key: len(first) for key, first in self._first.items()}
        if given != expected:
            raise ValueError(f"StreamingCka: features {given} differ from the first {expected}")


def _reduced(
    student: Mapping[str, ArrayLike],
    teacher: Mapping[str, ArrayLike],
    reduce: Callable[[ArrayLike], np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return (
        {name: flatten(reduce(x)) for name, x in student.items()},
        {name: flatten(reduce(y)) for name, y in teacher.items()},
    )


def _examples(student: Mapping[str, np.ndarray], teacher: Mapping[str, np.ndarray]) -> int:
    """The number of examples that all layers have."""
    if not student or not teacher:
        raise ValueError(f"CKA needs layers of both, given {list(student)} and {list(teacher)}")
    counts = {f"student {name}": len(x) for name, x in student.items()}
    counts |= {f"teacher {name}": len(y) for name, y in teacher.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"CKA needs the same examples for every layer, given {counts}")
    return next(iter(counts.values()))


def _centred(x: np.ndarray) -> np.ndarray:
    # About the first example a constant feature is exactly 0; its mean may be rounded.
    x = x - x[0]
    return x - x.mean(0)


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """‖yᵀx‖² = Σ (xxᵀ)∘(yyᵀ) of centred features, by the form with fewer multiplications."""
    n, dx, dy = len(x), x.shape[1], y.shape[1]
    if dx * dy <= n * (dx + dy):
        return sum(np.sum((x[:, i : i + _BLOCK].T @ y) ** 2) for i in range(0, dx, _BLOCK))
    blocks = (slice(i, i + _BLOCK) for i in range(0, n, _BLOCK))
    return sum(np.sum((x[rows] @ x.T) * (y[rows] @ y.T)) for rows in blocks)


def _ratio(cross: float, own_x: float, own_y: float) -> float:
    scale = np.sqrt(own_x) * np.sqrt(own_y)
    return float("nan") if scale == 0 else float(cross / scale)
