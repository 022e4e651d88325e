"""A metric against a cost: the front that nothing beats, and where points go so that all show."""

import itertools
import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns indices of the (cost, merit) points that no cheaper or equal one beats, by cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def zoom_floor(merits: Sequence[float]) -> float | None:
    """Returns the merit above which a second panel helps; None where one panel is enough.

    Half of the arms or more, and three at least, then share a quarter of the first panel or less.
    """
    ordered = sorted(merits)
    if not ordered or ordered[0] == ordered[-1]:
        return None
    quarter = ordered[-1] - (ordered[-1] - ordered[0]) / 4
    below = sum(a < quarter for a in ordered)
    if below > len(ordered) / 2 or len(ordered) - below < 3:
        return None
    return (ordered[below - 1] + ordered[below]) / 2


def side_by_side(costs: Sequence[float]) -> list[float]:
    """Returns costs, with those that markers would cover spread evenly (in log) around their mean.

    Such are equal within 2%, or within 1% of the logarithmic range of all.
    """
    if not costs:
        return []
    order = sorted(range(len(costs)), key=lambda i: costs[i])
    logs = [math.log(cost) for cost in costs]
    near = max(math.log(1.02), 0.01 * (max(logs) - min(logs)))
    groups = [[order[0]]]
    for i in order[1:]:
        if logs[i] <= logs[groups[-1][0]] + near:
            groups[-1].append(i)
        else:
            groups.append([i])
    centers = [sum(logs[i] for i in group) / len(group) for group in groups]
    span = max(centers[-1] - centers[0], 1.0)
    gaps = [math.inf, *(b - a for a, b in itertools.pairwise(centers)), math.inf]
    places = [0.0] * len(costs)
    for g, group in enumerate(groups):
        room = 0.7 * min(gaps[g], gaps[g + 1])
        step = min(0.02 * span, room / len(group))
        for k, i in enumerate(group):
            places[i] = math.exp(centers[g] + step * (k - (len(group) - 1) / 2))
    return places
