"""The baseline: the same bits everywhere, or everywhere but in the first and the last layer."""

from collections.abc import Sequence

from kdq.search.problem import Policy, Problem


class Uniform:
    """Every uniform policy that keeps the budgets, and each with the most bits at both ends."""

    needs = ()

    def __init__(self, problem: Problem, *, seed: int, evaluations: int):
        bits = [i for i, one in enumerate(problem.decisions) if one.kind == "bits"]
        labels = dict.fromkeys(label for i in bits for label in problem.decisions[i].options)
        found: dict[Policy, None] = {}
        for student in range(problem.students):
            for label in labels:
                flat = _policy(problem, student, label)
                ends = list(flat)
                for i in (*bits[:1], *bits[-1:]):
                    ends[i] = len(problem.decisions[i].options) - 1
                found |= dict.fromkeys((flat, tuple(ends)))
        self._left = [policy for policy in found if problem.feasible(policy)][:evaluations]

    def propose(self) -> list[Policy]:
        left, self._left = self._left, []
        return left

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        """There is nothing to learn."""


def _policy(problem: Problem, student: int, label: str) -> Policy:
    """Those bits where a layer can have them, else the most that it can; what can be, distilled."""
    return (
        student,
        *(
            one.options.index(label) if label in one.options else len(one.options) - 1
            for one in problem.decisions[1:]
        ),
    )
