"""Integer linear programs over policies, solved to the optimum by HiGHS (scipy.optimize.milp)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, sparse
from scipy.optimize import LinearConstraint

if TYPE_CHECKING:  # it solves them
    from kdq.search.problem import Policy, Problem


def best(problem: "Problem", exclude: Iterable["Policy"] = ()) -> "Policy | None":
    """Returns the policy of least predicted objective within the limits; None if none is left.

    A multiple-choice knapsack, of several budgets at once, over all students; `exclude` is ruled
    out. What pairs of options add is linearized: a variable for each pair, the product of its two.
    """
    program = _Program(problem)
    single = [problem.sensitivity[at] for at in program.options]
    pairs = [problem.pairs.get(at, 0.0) for at in program.pairs]
    cost = np.concatenate([problem.base, single, pairs])
    excluded = list(exclude)
    while True:
        policy = program.solve(cost, program.within() + [program.without(p) for p in excluded])
        # HiGHS keeps constraints to a tolerance; a budget is kept or not.
        if policy is None or problem.feasible(policy):
            return policy
        excluded.append(policy)


def nearest(problem: "Problem", student: int | None = None) -> "Policy":
    """Returns the policy whose largest share of a limit is the least, of one student or of all."""
    program = _Program(problem, slack=True)
    cost = np.zeros(program.count)
    cost[-1] = float(bool(problem.limits))  # without limits there is nothing to be near to
    only = [] if student is None else [LinearConstraint(np.eye(1, program.count, student), 1, 1)]
    policy = program.solve(cost, program.within() + only)
    assert policy is not None  # the share has no bound
    return policy


class _Program:
    """Variables: one a student, one an option, one a pair, and with `slack` a common share."""

    def __init__(self, problem: "Problem", slack: bool = False):
        self.problem, self.slack = problem, slack
        valid = problem.valid.copy()
        valid[:, 0] = False  # the options of the first decision are the students' variables
        self.options = list(zip(*(axis.tolist() for axis in np.nonzero(valid)), strict=True))
        self.place = {at: problem.students + i for i, at in enumerate(self.options)}
        self.first_pair = problem.students + len(self.options)
        # Every pair of options of two layers that add something to each other.
        layers = dict.fromkeys((s, d, e) for s, d, _, e, _ in problem.pairs if not slack)
        exists = lambda s, d: np.flatnonzero(problem.valid[s, d]).tolist()
        self.pairs = [
            (s, d, o, e, p) for s, d, e in layers for o in exists(s, d) for p in exists(s, e)
        ]
        self.count = self.first_pair + len(self.pairs) + slack

    def solve(self, cost: np.ndarray, constraints: list[LinearConstraint]) -> "Policy | None":
        integrality = np.ones(self.count)
        integrality[self.first_pair :] = 0  # products of integers are integers anyway
        lower, upper = np.zeros(self.count), np.ones(self.count)
        if self.slack:
            lower[-1], upper[-1] = -np.inf, np.inf
        scale = np.abs(cost).max(initial=0.0) or 1.0  # tolerances are absolute
        solution = optimize.milp(
            cost / scale,
            integrality=integrality,
            bounds=optimize.Bounds(lower, upper),
            constraints=[self._policies(), *self._products(), *constraints],
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:
            return None
        student = int(solution.x[: self.problem.students].argmax())
        policy = [student]
        for decision in range(1, len(self.problem.decisions)):  # of each the option nearest to 1
            options = np.flatnonzero(self.problem.valid[student, decision]).tolist()
            values = [solution.x[self.place[student, decision, o]] for o in options]
            policy.append(options[int(np.argmax(values))])
        return tuple(policy)

    def within(self) -> list[LinearConstraint]:
        """Each metric at most its limit; with slack, at most that share of it."""
        rows, limits = [], []
        for metric, limit in self.problem.limits.items():
            unit = abs(limit) or 1.0
            row = np.zeros(self.count)
            row[: self.problem.students] = self.problem.constants[metric] / unit
            for at, place in self.place.items():
                row[place] = self.problem.costs[metric][at] / unit
            # Beyond a limit of 0 or less the excess counts; of others the share.
            row[-1] -= float(self.slack)
            rows.append(row), limits.append(limit / unit - float(self.slack))
        return [LinearConstraint(np.stack(rows), -np.inf, np.array(limits))] if rows else []

    def without(self, policy: "Policy") -> LinearConstraint:
        """Not this policy."""
        row = np.zeros(self.count)
        for decision, option in enumerate(policy[1:], 1):
            row[self.place[policy[0], decision, option]] = 1
        return LinearConstraint(row[None], -np.inf, len(policy) - 2)

    def _policies(self) -> LinearConstraint:
        """One student, and one option of each of its decisions."""
        students, decisions = self.problem.valid.shape[:2]
        entries = [(0, student, 1.0) for student in range(students)]
        targets = [1.0]
        for student in range(students):
            for decision in range(1, decisions):
                row = len(targets)
                entries.append((row, student, -1.0))
                for option in np.flatnonzero(self.problem.valid[student, decision]).tolist():
                    entries.append((row, self.place[student, decision, option], 1.0))
                targets.append(0.0)
        return LinearConstraint(self._matrix(entries), targets, targets)

    def _products(self) -> list[LinearConstraint]:
        """Over the options of one layer, a pair's variables add up to the variable of the other.

        So each is the product of its two, and without integers the bound is far tighter than by a
        row for each product.
        """
        sums: dict[tuple, list[int]] = {}
        for i, (s, d, o, e, p) in enumerate(self.pairs, self.first_pair):
            sums.setdefault((self.place[s, d, o], e), []).append(i)
            sums.setdefault((self.place[s, e, p], d), []).append(i)
        entries = []
        for row, ((option, _), both) in enumerate(sums.items()):
            entries += [*((row, column, 1.0) for column in both), (row, option, -1.0)]
        return [LinearConstraint(self._matrix(entries), 0, 0)] if entries else []

    def _matrix(self, entries: list[tuple[int, int, float]]) -> sparse.csr_array:
        """Returns a matrix from (row, column, value), rows in order."""
        rows, columns, values = zip(*entries, strict=True)
        return sparse.csr_array((values, (rows, columns)), shape=(rows[-1] + 1, self.count))
