"""What a run tells about itself as it goes."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

Record = dict[str, Any]
T = TypeVar("T")


class Progress:
    """Told what happens; this one says nothing."""

    def start(self, arms: int) -> None:
        """So many arms, counted once a seed, make up the run."""

    def beside(self, process: int) -> "Progress":
        """Who is told of what one of several processes does; `done` is told here."""
        return self

    def arm(self, name: str, seeds: Sequence[int], steps: int) -> None:
        """An arm begins, with these seeds at once; it will take `steps` steps."""

    def step(self, step: int) -> None:
        """So many of the arm's steps are done."""

    def method(self, items: Iterable[T], description: str) -> Iterable[T]:
        """A post-training method goes through `items`, which are returned to it."""
        return items

    def search(self, name: str, seed: int, evaluations: int) -> None:
        """A search begins; it will evaluate so many policies."""

    def evaluated(self, count: int, best: str) -> None:
        """So many policies are evaluated; what is to be said of the best."""

    def done(self, record: Record) -> None:
        """An arm ended, or had been run before."""
