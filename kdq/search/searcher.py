"""The contract of searchers."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from kdq.search.problem import Policy, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSettings:
    """Settings of a searcher without options."""


class Searcher(Protocol):
    """Proposes policies that keep the budgets, and learns from their scores.

    All that is random comes from the seed: given the same scores, it proposes the same policies. So
    a search that was killed resumes by giving a new searcher the scores in its log.
    """

    # A frozen dataclass of its options, each with a default: the keys of `config.search.options`.
    Settings: ClassVar[type] = NoSettings
    needs: ClassVar[tuple[str, ...]] = ()  # of the problem: "sensitivity", "pairs"
    libraries: ClassVar[tuple[str, ...]] = ()  # modules of the extra kdq[search]

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        """Makes a new searcher.

        Args:
          problem: with what it `needs`.
          seed: of all that is random.
          evaluations: how many policies it may propose in all.
          settings: a `Settings`.
        """

    def propose(self) -> list[Policy]:
        """Returns the next policies, to be evaluated together; none if nothing is left to try."""
        raise NotImplementedError

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        """Learns from the policies proposed last; does nothing if a searcher does not learn.

        Args:
          policies: as proposed, or the first of them.
          scores: the objective of each; less is better.
        """
