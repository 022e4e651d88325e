"""What methods take in common, and what they refuse."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from kdq.types import Array, QParams

T = TypeVar("T")
# Wraps a loop under a description, as `kdq.data.progress.track` does with a length.
Progress = Callable[[Iterable[T], str], Iterable[T]]
Static = tuple[tuple[str, Any], ...]


def quiet(items: Iterable[T], description: str) -> Iterable[T]:
    """The progress that shows nothing."""
    return items


def static(apply_kwargs: Mapping[str, Any] | None) -> Static:
    """`apply_kwargs` as a hashable argument of a `jit`."""
    return tuple(sorted((apply_kwargs or {}).items()))


def as_list(batches: Iterable[Array | tuple], method: str) -> Sequence[Array | tuple]:
    """The batches, to be read several times. Raises ValueError if there are none."""
    batches = list(batches)
    if not batches:
        raise ValueError(f"{method} got no batches: want at least one")
    return batches


def check_positive(method: str, **options: float) -> None:
    """Raises ValueError for an option that is not above 0."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{method}: {name}={value!r}: want more than 0")


def refuse_quantizers(qparams: QParams, method: str) -> None:
    """Raises ValueError for quantizers that a change of the weights would leave behind."""
    if qparams:
        raise ValueError(
            f"{method} changes weights, and so comes before calibrate: want qparams={{}}, "
            f"got those of {list(qparams)}"
        )
