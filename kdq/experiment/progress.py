"""Progress of a run, for whoever shows it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from kdq.record import ArmRecord

Unit = tuple[str, int]  # an arm and a seed
T = TypeVar("T")


class Progress:
    """Told what happens; this one says nothing."""

    def start(self, steps: Mapping[Unit, int | None]) -> None:
        """These make up the run, each of so many steps; None: it has been run before."""

    def beside(self, process: int) -> "Progress":
        """Returns the progress of one of several processes; `done` is told here."""
        return self

    def prepare(self, name: str, seed: int) -> None:
        """Called when an arm's start is being made: its bits are searched for, it is calibrated."""

    def arm(self, name: str, seeds: Sequence[int], steps: int) -> None:
        """An arm begins, with these seeds at once; it will take `steps` steps."""

    def step(self, step: int) -> None:
        """So many of the arm's steps are done."""

    def stage(self, description: str, done: int, total: int) -> None:
        """So many parts of a post-training method, or of what else takes long, are done."""

    def method(self, items: Iterable[T], description: str) -> Iterator[T]:
        """A post-training method goes through `items`, which are returned to it."""
        items = list(items)
        self.stage(description, 0, len(items))
        for count, item in enumerate(items, 1):
            yield item
            self.stage(description, count, len(items))

    def search(self, name: str, seed: int, evaluations: int) -> None:
        """A search begins; it will evaluate so many policies."""

    def evaluated(self, count: int, best: str) -> None:
        """So many policies are evaluated; what is to be said of the best."""

    def done(self, record: ArmRecord) -> None:
        """An arm ended, or had been run before."""
