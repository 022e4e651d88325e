"""From networks, cost tables and sensitivities to the problem that searchers see."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from kdq.fields import ConfigError, unknown
from kdq.quantize.layers import LayerInfo
from kdq.search.bank import Choices, bits_of
from kdq.search.cost import CostTable
from kdq.search.problem import Decision, Problem

KINDS = ("Dense", "Conv", "Embed", "Einsum")  # of layers that an agent tells apart
DISTILLED = "distill/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """One of the networks that a policy may be for."""

    name: str  # of its arm
    layers: Mapping[str, LayerInfo]
    choices: Choices
    costs: CostTable
    sensitivity: Sequence[np.ndarray] | None = None  # of each layer: [choices]
    base: float = 0.0  # of the objective, with nothing quantized
    # {(layer, choice, other layer, its choice): what both add beyond the sum of each}
    pairs: Mapping[tuple[int, int, int, int], float] = dataclasses.field(default_factory=dict)


def limits_of(
    students: Sequence[Student], most: Mapping[str, float], share: Mapping[str, float]
) -> dict[str, float]:
    """Returns budgets as numbers: `most`, and `share` of the costliest student.

    That is what it costs with every layer at its last choice. Raises ConfigError for a metric that
    no table has, or one with two budgets.
    """
    known = students[0].costs.metrics
    for metric in (*most, *share):
        if metric not in known:
            raise ConfigError(unknown("budget:", metric, known))
    if both := most.keys() & share.keys():
        raise ConfigError(f"two budgets each of {sorted(both)}: expected `most` or `share`")
    last = [{path: bits[-1] for path, bits in student.choices.items()} for student in students]
    whole = lambda metric: max(
        student.costs.total(metric, chosen) for student, chosen in zip(students, last, strict=True)
    )
    return {**most, **{metric: part * whole(metric) for metric, part in share.items()}}


def make_problem(
    students: Sequence[Student], limits: Mapping[str, float], distilled: Sequence[str] = ()
) -> Problem:
    """Returns the problem of choosing a student, its layers' bits, and the terms that distill it.

    `limits` are budgets by metric, `distilled` the terms of the recipe that a policy may leave out.

    Raises:
      ConfigError: students that differ in their layers or in the choices of these.
      InfeasibleError: budgets that no policy keeps.
    """
    first = students[0]
    for other in students[1:]:
        if other.choices != first.choices:
            raise ConfigError(
                f"students {first.name!r} and {other.name!r} differ in layers or their choices: "
                f"{dict(first.choices)} and {dict(other.choices)}"
            )
    decisions = _decisions(students, distilled)
    counts = np.array([len(decision.options) for decision in decisions])
    valid = np.tile(np.arange(counts.max()) < counts[:, None], (len(students), 1, 1))

    def place(values: Callable[[Student], Iterable[Sequence[float]]]) -> np.ndarray:
        """Places values of each student's layers at their decisions."""
        array = np.zeros(valid.shape)
        for s, student in enumerate(students):
            for i, row in enumerate(values(student), 1):
                array[s, i, : len(row)] = row
        return array

    tables = first.costs.metrics
    costs = {m: place(lambda s, m=m: s.costs.rows(m, s.choices)) for m in tables}
    constants = {m: np.array([s.costs.metrics[m].constant for s in students]) for m in tables}
    # Costs of the worst layer alone are limits on each choice, which need no budget.
    layers = slice(1, 1 + len(first.choices))
    exists = valid[:, layers].copy()
    for metric in [m for m, table in tables.items() if table.worst]:
        limit = limits.get(metric, np.inf)
        cost = (costs.pop(metric) + constants.pop(metric)[:, None, None])[:, layers]
        least = np.where(exists, cost, np.inf).min(-1).max(-1)  # [students]
        valid[:, layers] &= (cost <= limit) | (least > limit)[:, None, None]
        if least.max() > limit:  # no choice of layers makes up for that student
            costs[metric], constants[metric] = np.zeros(valid.shape), least
    guided = all(student.sensitivity is not None for student in students)
    problem = Problem(
        decisions=decisions,
        valid=valid,
        costs=costs,
        constants=constants,
        limits={m: limit for m, limit in limits.items() if m in costs or m not in tables},
        features=_features(students, decisions),
        sensitivity=place(lambda student: student.sensitivity) if guided else None,
        base=np.array([student.base for student in students]) if guided else None,
        pairs={
            (s, i + 1, a, j + 1, b): value
            for s, student in enumerate(students)
            for (i, a, j, b), value in student.pairs.items()
        },
    )
    problem.check()
    return problem


def _decisions(students: Sequence[Student], distilled: Sequence[str]) -> tuple[Decision, ...]:
    """Returns the decisions for the student, each layer's bits, and each term."""
    last = max(1, len(students) - 1)
    student = Decision(
        name="student",
        options=tuple(student.name for student in students),
        places=tuple((i / last, 0.0) for i in range(len(students))),
        kind="student",
    )
    layers = [
        Decision(name=path, options=tuple(choices), places=_rank(choices))
        for path, choices in students[0].choices.items()
    ]
    switch = {"options": ("off", "on"), "places": ((0.0, 0.0), (1.0, 0.0)), "kind": "distilled"}
    return (student, *layers, *(Decision(name=DISTILLED + name, **switch) for name in distilled))


def _rank(choices: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """Returns places of bits by rank: 2, 3, 4 and 8 bits are equally far from each other."""
    places = []
    for column in np.array([bits_of(choice) for choice in choices]).T:
        values = np.unique(column)
        places.append((np.searchsorted(values, column) / max(1, len(values) - 1)).tolist())
    return tuple(zip(*places, strict=True))


def _features(students: Sequence[Student], decisions: Sequence[Decision]) -> np.ndarray:
    """Returns what an agent sees of each decision: its kind, and of layers the sizes, 0 to 1."""
    log = lambda number, most: math.log2(max(number, 1)) / most
    rows = []
    for student in students:
        for decision in decisions:
            layer, sizes = student.layers.get(decision.name), [0.0] * 6
            if layer is not None:
                sizes = [
                    log(layer.input_shape[-1], 12),
                    log(layer.output_shape[-1], 12),
                    log(math.prod(layer.output_shape[1:-1]), 16),  # positions
                    log(math.prod(layer.weight_shape[:-2]), 6),  # kernel
                    log(layer.macs, 36),
                    log(layer.weight_count, 24),
                ]
            kinds = [decision.kind == "student", decision.kind == "distilled"]
            kinds += [layer is not None and layer.kind == kind for kind in KINDS]
            rows.append([*map(float, kinds), *sizes])
    return np.array(rows, np.float32).reshape(len(students), len(decisions), -1)
