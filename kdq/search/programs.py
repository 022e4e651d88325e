"""Integer linear programs over policies, solved to the optimum by HiGHS (scipy.optimize.milp)."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, sparse

if TYPE_CHECKING:
    from kdq.search.problem import Policy, Problem


def best(problem: "Problem", exclude: Iterable["Policy"] = ()) -> "Policy | None":
    """The policy with the least predicted objective within the limits; None if there is no more.

    A multiple-choice knapsack, of several budgets at once, over all students. What pairs of options
    add is linearized: a variable for each pair, which is the product of its two.

    Args:
      problem: with its sensitivity.
      exclude: policies that are not wanted again.
    """
    program = _Program(problem)
    cost = np.concatenate(
        [
            problem.base,
            [problem.sensitivity[at] for at in program.options],
            [problem.pairs.get(at, 0.0) for at in program.pairs],
        ]
    )
    excluded = list(exclude)
    while True:
        found = program.solve(cost, program.within() + [program.without(p) for p in excluded])
        # HiGHS keeps constraints to a tolerance; a budget is kept or not.
        if found is None or problem.feasible(found):
            return found
        excluded.append(found)


def nearest(problem: "Problem", student: int | None = None) -> "Policy":
    """The policy whose largest share of a limit is the least, of one student or of all."""
    program = _Program(problem, slack=True)
    cost = np.zeros(program.count)
    cost[-1] = float(bool(problem.limits))  # without limits there is nothing to be near to
    wanted = [] if student is None else [program.only(student)]
    found = program.solve(cost, program.within() + wanted)
    assert found is not None  # the share has no bound
    return found


@dataclasses.dataclass
class _Program:
    """Variables: a student each, an option each, a pair each, and with `slack` a common share."""

    problem: "Problem"
    slack: bool = False

    def __post_init__(self) -> None:
        valid = self.problem.valid.copy()
        valid[:, 0] = False  # of the student: variables of their own
        self.options = list(zip(*(axis.tolist() for axis in np.nonzero(valid)), strict=True))
        first = self.problem.students
        self.place = {at: first + i for i, at in enumerate(self.options)}
        self.pairs = [] if self.slack else self._all_pairs()
        self.count = first + len(self.options) + len(self.pairs) + self.slack

    def _all_pairs(self) -> list[tuple[int, int, int, int, int]]:
        """Of two layers that do something to each other: every pair of their options."""
        layers = dict.fromkeys((s, d, e) for s, d, _, e, _ in self.problem.pairs)
        of = lambda s, d: np.flatnonzero(self.problem.valid[s, d]).tolist()
        return [(s, d, o, e, p) for s, d, e in layers for o in of(s, d) for p in of(s, e)]

    def solve(
        self, cost: np.ndarray, constraints: list[optimize.LinearConstraint]
    ) -> "Policy | None":
        integrality = np.ones(self.count)
        integrality[self.problem.students + len(self.options) :] = 0  # products of integers are
        upper = np.ones(self.count)
        if self.slack:
            upper[-1] = np.inf
        scale = np.abs(cost).max(initial=0.0) or 1.0  # tolerances are absolute
        solution = optimize.milp(
            cost / scale,
            integrality=integrality,
            bounds=optimize.Bounds(np.where(upper == np.inf, -np.inf, 0), upper),
            constraints=[*self._policies(), *self._products(), *constraints],
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:
            return None
        return self._policy(solution.x)

    def within(self) -> list[optimize.LinearConstraint]:
        """Each metric at most its limit, or at most that share of it."""
        rows = []
        for metric, limit in self.problem.limits.items():
            unit = abs(limit) or 1.0
            row = np.zeros(self.count)
            row[: self.problem.students] = self.problem.constants[metric] / unit
            for at, place in self.place.items():
                row[place] = self.problem.costs[metric][at] / unit
            # Of a limit of 0 or less, what is beyond it; of others, as a share.
            row[-1] -= float(self.slack)
            rows.append((row, limit / unit - float(self.slack)))
        if not rows:
            return []
        matrix, limits = zip(*rows, strict=True)
        return [optimize.LinearConstraint(np.stack(matrix), -np.inf, np.array(limits))]

    def only(self, student: int) -> optimize.LinearConstraint:
        """This student."""
        row = np.zeros(self.count)
        row[student] = 1
        return optimize.LinearConstraint(row[None], 1, 1)

    def without(self, policy: "Policy") -> optimize.LinearConstraint:
        """Not this policy."""
        student = policy[0]
        row = np.zeros(self.count)
        for decision, option in enumerate(policy[1:], 1):
            row[self.place[student, decision, option]] = 1
        return optimize.LinearConstraint(row[None], -np.inf, len(policy) - 2)

    def _policies(self) -> list[optimize.LinearConstraint]:
        """One student, and of its decisions one option each."""
        students, decisions = self.problem.valid.shape[:2]
        rows, columns, values = [0] * students, list(range(students)), [1.0] * students
        targets = [1.0]
        for student in range(students):
            for decision in range(1, decisions):
                rows.append(len(targets)), columns.append(student), values.append(-1.0)
                for option in np.flatnonzero(self.problem.valid[student, decision]):
                    rows.append(len(targets))
                    columns.append(self.place[student, decision, int(option)])
                    values.append(1.0)
                targets.append(0.0)
        matrix = sparse.csr_array((values, (rows, columns)), shape=(len(targets), self.count))
        return [optimize.LinearConstraint(matrix, targets, targets)]

    def _products(self) -> list[optimize.LinearConstraint]:
        """Over the options of one layer, a pair's variables add up to the variable of the other.

        So each is the product of its two, and without integers the bound is far tighter than by a
        row for each product.
        """
        if not self.pairs:
            return []
        first = self.problem.students + len(self.options)
        sums: dict[tuple, list[int]] = {}
        for i, (s, d, o, e, p) in enumerate(self.pairs, first):
            sums.setdefault((self.place[s, d, o], e), []).append(i)
            sums.setdefault((self.place[s, e, p], d), []).append(i)
        rows, columns, values = [], [], []
        for row, ((option, _), both) in enumerate(sums.items()):
            rows += [row] * (len(both) + 1)
            columns += [*both, option]
            values += [*[1.0] * len(both), -1.0]
        matrix = sparse.csr_array((values, (rows, columns)), shape=(len(sums), self.count))
        return [optimize.LinearConstraint(matrix, 0, 0)]

    def _policy(self, x: np.ndarray) -> "Policy":
        student = int(x[: self.problem.students].argmax())
        policy = [student]
        for decision in range(1, len(self.problem.decisions)):
            options = np.flatnonzero(self.problem.valid[student, decision])
            weights = [x[self.place[student, decision, int(o)]] for o in options]
            policy.append(int(options[int(np.argmax(weights))]))
        return tuple(policy)
