"""What methods take in common, and what they refuse."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from kdq.quantize.inputs import Batch, Inputs, as_batches
from kdq.types import QParams

T = TypeVar("T")
# Wraps a loop under a description, as `kdq.data.progress.track` does with a length.
Progress = Callable[[Iterable[T], str], Iterable[T]]


def quiet(items: Iterable[T], description: str) -> Iterable[T]:
    """The progress that shows nothing."""
    return items


def as_list(batches: Iterable[Batch], method: str) -> Sequence[Inputs]:
    """The batches, to be read several times. Raises what `as_batches` does."""
    return list(as_batches(batches, method))


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
