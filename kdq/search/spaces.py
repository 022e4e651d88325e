"""From networks, cost tables and sensitivities to the problem that searchers see."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from kdq.fields import ConfigError, unknown
from kdq.quantize.layers import LayerInfo
from kdq.search.bank import Choices, bits_of
from kdq.search.cost import CostTable
from kdq.search.feasible import Feasible
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
    """Returns budgets as numbers.

    Args:
      students: to choose from.
      most: at most so much.
      share: at most this share of what the costliest student costs with every layer at its last
        choice.

    Raises:
      ConfigError: a metric that no table has, or one with two budgets.
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

    Args:
      students: of layers by the same paths, with the same choices.
      limits: budgets, by metric.
      distilled: terms of the recipe that a policy may leave out.

    Raises:
      ConfigError: students that differ in their layers.
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
    shape = (len(students), len(decisions), max(len(d.options) for d in decisions))
    valid = np.zeros(shape, bool)
    for i, decision in enumerate(decisions):
        valid[:, i, : len(decision.options)] = True
    sums = [m for m, table in first.costs.metrics.items() if not table.worst]
    costs = {metric: np.zeros(shape) for metric in sums}
    constants = {m: np.array([s.costs.metrics[m].constant for s in students]) for m in sums}
    for s, student in enumerate(students):
        for i, (path, choices) in enumerate(student.choices.items(), 1):
            for metric in sums:
                layer = student.costs.metrics[metric].layers[path]
                costs[metric][s, i, : len(choices)] = [layer[bits] for bits in choices]
    # The rest are costs of the worst layer alone: limits on each choice, which need no budget.
    for metric in limits.keys() - costs.keys():
        each = zip(students, valid, strict=True)
        least = [_keep_below(limits[metric], metric, *pair) for pair in each]
        if max(least) > limits[metric]:  # no choice of layers makes up for that student
            costs[metric], constants[metric] = np.zeros(shape), np.array(least)
    sensitivity = None
    if guided := all(student.sensitivity is not None for student in students):
        sensitivity = np.zeros(shape)
        for s, student in enumerate(students):
            for i, values in enumerate(student.sensitivity, 1):
                sensitivity[s, i, : len(values)] = values
    problem = Problem(
        decisions=decisions,
        valid=valid,
        costs=costs,
        constants=constants,
        limits={m: limit for m, limit in limits.items() if m in costs},
        features=_features(students, decisions),
        sensitivity=sensitivity,
        base=np.array([student.base for student in students]) if guided else None,
        pairs={
            (s, i + 1, a, j + 1, b): value
            for s, student in enumerate(students)
            for (i, a, j, b), value in student.pairs.items()
        },
    )
    Feasible(problem).check()
    return problem


def _decisions(students: Sequence[Student], distilled: Sequence[str]) -> tuple[Decision, ...]:
    """Returns the decisions for the student, each layer's bits, and each term."""
    count = len(students)
    student = Decision(
        name="student",
        options=tuple(student.name for student in students),
        places=tuple((i / max(1, count - 1), 0.0) for i in range(count)),
        kind="student",
    )
    layers = [
        Decision(name=path, options=tuple(choices), places=_rank(choices))
        for path, choices in students[0].choices.items()
    ]
    terms = [
        Decision(
            name=DISTILLED + name,
            options=("off", "on"),
            places=((0.0, 0.0), (1.0, 0.0)),
            kind="distilled",
        )
        for name in distilled
    ]
    return (student, *layers, *terms)


def _rank(choices: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """Returns places of bits by rank: 2, 3, 4 and 8 bits are equally far from each other."""
    places = []
    for column in np.array([bits_of(choice) for choice in choices]).T:
        values = np.unique(column)
        places.append((np.searchsorted(values, column) / max(1, len(values) - 1)).tolist())
    return tuple(zip(*places, strict=True))


def _keep_below(limit: float, metric: str, student: Student, valid: np.ndarray) -> float:
    """Rules out the choices of layers that alone are beyond a limit; returns the least cost left.

    A student of which that leaves nothing keeps them all.
    """
    table = student.costs.metrics[metric]
    costs = [
        np.array([table.constant + table.layers[path][bits] for bits in choices])
        for path, choices in student.choices.items()
    ]
    least = max(layer.min() for layer in costs)
    if least <= limit:
        for i, layer in enumerate(costs, 1):
            valid[i, : len(layer)] &= layer <= limit
    return float(least)


def _features(students: Sequence[Student], decisions: Sequence[Decision]) -> np.ndarray:
    """Returns what an agent sees of each decision: its kind, and of layers the sizes, 0 to 1."""
    rows = []
    for student in students:
        for decision in decisions:
            layer = student.layers.get(decision.name)
            kinds = [decision.kind == "student", decision.kind == "distilled"]
            kinds += [layer is not None and layer.kind == kind for kind in KINDS]
            rows.append([*map(float, kinds), *(_sizes(layer) if layer else [0.0] * 6)])
    return np.array(rows, np.float32).reshape(len(students), len(decisions), -1)


def _sizes(layer: LayerInfo) -> list[float]:
    """Returns logarithms of channels in and out, positions, kernel, MACs and weights."""
    log = lambda number, most: math.log2(max(number, 1)) / most
    return [
        log(layer.input_shape[-1], 12),
        log(layer.output_shape[-1], 12),
        log(math.prod(layer.output_shape[1:-1]), 16),
        log(math.prod(layer.weight_shape[:-2]), 6),
        log(layer.macs, 36),
        log(layer.weight_count, 24),
    ]
