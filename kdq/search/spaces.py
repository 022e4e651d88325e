"""From networks, cost tables and sensitivities to the problem that searchers see."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

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
    """Budgets as numbers.

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
        raise ConfigError(f"two budgets each of {sorted(both)}: want `most` or `share`")
    whole = lambda metric: max(
        one.costs.total(metric, {path: own[-1] for path, own in one.choices.items()})
        for one in students
    )
    return {**most, **{metric: part * whole(metric) for metric, part in share.items()}}


def make_problem(
    students: Sequence[Student], limits: Mapping[str, float], distilled: Sequence[str] = ()
) -> Problem:
    """The problem of choosing a student, the bits of its layers, and what of it is distilled.

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
    decisions = [_of_students(students)]
    decisions += [_of_layer(path, own) for path, own in first.choices.items()]
    decisions += [_of_term(name) for name in distilled]
    shape = (len(students), len(decisions), max(len(one.options) for one in decisions))
    valid = np.zeros(shape, bool)
    for i, one in enumerate(decisions):
        valid[:, i, : len(one.options)] = True
    sums = [m for m, own in first.costs.metrics.items() if not own.worst]
    costs = {metric: np.zeros(shape) for metric in sums}
    constants = {m: np.array([s.costs.metrics[m].constant for s in students]) for m in sums}
    for s, student in enumerate(students):
        for i, (path, own) in enumerate(student.choices.items(), 1):
            for metric, table in student.costs.metrics.items():
                if not table.worst:
                    costs[metric][s, i, : len(own)] = [table.layers[path][bits] for bits in own]
    for metric in limits.keys() - costs.keys():
        each = zip(students, valid, strict=True)
        least = [_keep_below(limits[metric], metric, *one) for one in each]
        if max(least) > limits[metric]:  # what no choice of layers makes good
            costs[metric], constants[metric] = np.zeros(shape), np.array(least)
    guided = all(student.sensitivity is not None for student in students)
    return Problem(
        decisions=tuple(decisions),
        valid=valid,
        costs=costs,
        constants=constants,
        limits={m: limit for m, limit in limits.items() if m in costs},
        features=_features(students, decisions),
        sensitivity=_sensitivities(students, shape) if guided else None,
        base=np.array([student.base for student in students]) if guided else None,
        pairs={
            (s, i + 1, a, j + 1, b): value
            for s, student in enumerate(students)
            for (i, a, j, b), value in student.pairs.items()
        },
    )


def _of_students(students: Sequence[Student]) -> Decision:
    count = len(students)
    return Decision(
        name="student",
        options=tuple(student.name for student in students),
        places=tuple((i / max(1, count - 1), 0.0) for i in range(count)),
        kind="student",
    )


def _of_layer(path: str, choices: Sequence[str]) -> Decision:
    """Places by rank: 2, 3, 4 and 8 bits are equally far from each other."""
    bits = np.array([bits_of(choice) for choice in choices])
    places = []
    for column in bits.T:
        values = np.unique(column)
        places.append(np.searchsorted(values, column) / max(1, len(values) - 1))
    return Decision(
        name=path,
        options=tuple(choices),
        places=tuple(zip(*(axis.tolist() for axis in places), strict=True)),
    )


def _of_term(name: str) -> Decision:
    return Decision(
        name=DISTILLED + name,
        options=("off", "on"),
        places=((0.0, 0.0), (1.0, 0.0)),
        kind="distilled",
    )


def _keep_below(limit: float, metric: str, student: Student, valid: np.ndarray) -> float:
    """Rules out the choices of layers that alone are beyond a limit; returns the least there is.

    A student of which that leaves nothing keeps them all.
    """
    own = student.costs.metrics[metric]
    values = [
        np.array([own.constant + own.layers[path][bits] for bits in choices])
        for path, choices in student.choices.items()
    ]
    least = max(of.min() for of in values)
    if least <= limit:
        for i, of in enumerate(values, 1):
            valid[i, : len(of)] &= of <= limit
    return float(least)


def _sensitivities(students: Sequence[Student], shape: tuple[int, ...]) -> np.ndarray:
    found = np.zeros(shape)
    for s, student in enumerate(students):
        for i, values in enumerate(student.sensitivity, 1):
            found[s, i, : len(values)] = values
    return found


def _features(students: Sequence[Student], decisions: Sequence[Decision]) -> np.ndarray:
    """What an agent is told of each decision: its kind, and of layers the sizes, about 0 to 1."""
    rows = []
    for student in students:
        for one in decisions:
            layer = student.layers.get(one.name)
            kinds = [one.kind == "student", one.kind == "distilled"]
            kinds += [layer is not None and layer.kind == kind for kind in KINDS]
            rows.append([*map(float, kinds), *(_sizes(layer) if layer else [0.0] * 6)])
    return np.array(rows, np.float32).reshape(len(students), len(decisions), -1)


def _sizes(layer: LayerInfo) -> list[float]:
    """Logarithms of channels in and out, positions, kernel, MACs and weights."""
    log = lambda number, most: math.log2(max(number, 1)) / most
    return [
        log(layer.input_shape[-1], 12),
        log(layer.output_shape[-1], 12),
        log(math.prod(layer.output_shape[1:-1]), 16),
        log(math.prod(layer.weight_shape[:-2]), 6),
        log(layer.macs, 36),
        log(layer.weight_count, 24),
    ]
