"""What a searcher is."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from kdq.search.problem import Policy, Problem


class Searcher(Protocol):
    """Proposes policies that keep the budgets, and learns from how good they are.

    All that is random comes from the seed: told the same scores, it proposes the same policies. So
    a search that was killed goes on by telling a new searcher what its log says.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # of the problem: "sensitivity", "pairs"
    # Modules of the extra kdq[search] that it takes; a searcher that takes none may leave this out.
    libraries: ClassVar[tuple[str, ...]] = ()

    def __init__(self, problem: Problem, *, seed: int, evaluations: int):
        """A searcher; further keywords are its options.

        Args:
          problem: with what it `needs`.
          seed: of all that is random.
          evaluations: how many policies it may propose in all.
        """

    def propose(self) -> list[Policy]:
        """The next policies, to be evaluated together; none if there is nothing more to try."""

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        """What came of those proposed last.

        Args:
          policies: as proposed, or the first of them.
          scores: the objective of each; less is better.
        """
