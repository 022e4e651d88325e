"""What a run tells about itself as it goes."""

from typing import Any

Record = dict[str, Any]


class Progress:
    """Told what happens; this one says nothing."""

    def start(self, arms: int) -> None:
        """So many arms, counted once a seed, make up the run."""

    def arm(self, name: str, seed: int, steps: int) -> None:
        """An arm begins; it will take `steps` steps."""

    def step(self, step: int) -> None:
        """So many of the arm's steps are done."""

    def done(self, record: Record) -> None:
        """An arm ended, or had been run before."""
