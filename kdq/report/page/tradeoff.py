"""The trade-off as a chart: accuracy against a cost, the frontier, and which arm each point is."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdq.report.front import pareto_front, side_by_side, zoom_floor
from kdq.report.page.labels import LAST, NARROW, WIDE, place_labels
from kdq.report.page.scales import GRAY, of_kinds, of_starts
from kdq.report.page.specs import SCHEMA, Point, Spec, tips

WIDE_LABELS, NARROW_LABELS = "labels_wide", "labels_narrow"  # names of layers
FAR = 4  # times the cost of any other: a teacher that a second chart leaves out


def pareto(points: Sequence[Point], cost: str, title: str) -> list[Spec]:
    """Accuracy against a cost, and a second chart of the best where others collapsed.

    Args:
      points: with "accuracy" [percent], "low" and "high" (None of one seed), "kind", "bits",
        "start", the cost, and what a tooltip is to show under "tip".
      cost: its key; above 0.
      title: of its axis.
    """
    shown = [p for p in points if (p.get(cost) or 0) > 0 and p["accuracy"] is not None]
    if not shown:
        return []
    best = shown
    # What collapsed, and a teacher far to the right, would hide what is between them.
    while (floor := zoom_floor([_lowest(p) for p in best])) is not None:
        best = [p for p in best if _lowest(p) >= floor]
    students, aside = [p for p in best if p["kind"] != "teacher"], ""
    reach = FAR * max((p[cost] for p in students), default=math.inf)
    if len(students) > 2 and any(p[cost] > reach for p in best):
        best, aside = students, ", the teacher aside"
    parts = [(shown, f"all {len(shown)} arms")]
    if len(best) < len(shown):
        parts.append((best, f"the best {len(best)} of {len(shown)}{aside}"))
    base = 2 if cost == "size" else 10
    return [_pareto(_placed(values, cost), title, subtitle, base) for values, subtitle in parts]


def _placed(points: Sequence[Point], cost: str) -> list[dict[str, Any]]:
    """With the place "x", and whether an arm is on the "front"."""
    places = side_by_side([p[cost] for p in points])
    front = set(pareto_front([(p[cost], p["accuracy"]) for p in points]))
    both = zip(points, places, strict=True)
    return [{**p, "x": x, "front": i in front} for i, (p, x) in enumerate(both)]


def _lowest(point: Point) -> float:
    return point["accuracy"] if point["low"] is None else point["low"]


def _shares(values: Sequence[float], ends: Iterable[float]) -> list[float]:
    """Where values lie between the least and the greatest of `ends`, from 0 to 1."""
    ends = list(ends)
    low, span = min(ends), max(ends) - min(ends) or 1.0
    return [(value - low) / span for value in values]


def _longest_step(points: Sequence[Point]) -> tuple[float, float] | None:
    """The middle of the longest level part of the frontier, in the units of the data."""
    front = sorted((p for p in points if p["front"]), key=lambda p: p["x"])
    steps = [(b["x"] / a["x"], a, b) for a, b in itertools.pairwise(front)]
    if not steps:
        return None
    _, start, end = max(steps, key=lambda step: step[0])
    return math.sqrt(start["x"] * end["x"]), start["accuracy"]


def _pareto(points: Sequence[Point], title: str, subtitle: str, base: int) -> Spec:
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": {"type": "log", "base": base, "nice": False, "padding": 16},
        "axis": {"grid": False, "tickCount": 6, "format": ",~r", "labelOverlap": "greedy"},
        "title": title,
    }
    one_seed = all(p["low"] is None for p in points)
    of_y = "test accuracy, %" if one_seed else "test accuracy, %, with 95% intervals"
    y = {"type": "quantitative", "scale": {"zero": False, "nice": False, "padding": 18}}
    values = [{k: v for k, v in p.items() if k != "tip"} | p["tip"] for p in points]
    line = {"type": "line", "interpolate": "step-after", "strokeDash": [4, 3]}
    layers = [
        {
            "transform": [{"filter": "datum.front"}],
            "mark": line,
            "encoding": {
                "y": {**y, "field": "accuracy", "title": of_y},
                "color": {"value": GRAY},
            },
        },
        {
            "transform": [{"filter": "datum.low != null"}],
            "mark": {"type": "rule", "strokeWidth": 1.3},
            "encoding": {
                "y": {**y, "field": "low", "title": of_y},
                "y2": {"field": "high"},
                "color": of_kinds(points),
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
            "encoding": {
                "y": {**y, "field": "accuracy"},
                "color": of_kinds(points),
                **of_starts(points),
                "tooltip": tips(points),
            },
        },
        *_texts(points, y),
    ]
    if one_seed:
        del layers[1]  # Vega warns of a scale of nothing
    return {
        "$schema": SCHEMA,
        "title": subtitle,
        "data": {"values": values},
        "encoding": {"x": x},
        "height": 340,
        "layer": layers,
    }


def _texts(points: Sequence[Point], y: Mapping[str, Any]) -> list[Spec]:
    """Arms of the frontier by their names, others by their bits, where there is room.

    A layer for each width of a chart, of which `draw` and the page choose one.
    """
    logs = [math.log(p["x"]) for p in points]
    ends = [v for p in points for v in (p["low"], p["high"], p["accuracy"]) if v is not None]
    across = _shares(logs, logs)
    up = _shares([p["accuracy"] for p in points], ends)
    places = [(x, 1 - y) for x, y in zip(across, up, strict=True)]
    labels = [
        {"x": p["x"], "accuracy": p["accuracy"], "weight": "bold" if p["front"] else "normal"}
        for p in points
    ]
    texts = [p["arm"] if p["front"] else p["bits"] for p in points]
    ranks = [1 if p["front"] else LAST for p in points]
    if middle := _longest_step(points):
        x, accuracy = middle
        labels.append({"x": x, "accuracy": accuracy, "weight": "normal"})
        share = (math.log(x) - min(logs)) / (max(logs) - min(logs) or 1.0)
        places.append((share, 1 - _shares([accuracy], ends)[0]))
        texts.append("frontier")
        ranks.append(0)
    layers = []
    for name, width in ((WIDE_LABELS, WIDE), (NARROW_LABELS, NARROW)):
        placed = place_labels(places, texts, ranks, width)
        values = [a | b for a, b in zip(labels, placed, strict=True) if b["label"]]
        style = {key: {"expr": f"datum.{key}"} for key in ("dx", "dy", "align")}
        style["fontWeight"] = {"expr": "datum.weight"}
        layers.append(
            {
                "name": name,
                "data": {"values": values},
                "mark": {"type": "text", "baseline": "middle", "fontSize": 10, **style},
                "encoding": {"y": {**y, "field": "accuracy"}, "text": {"field": "label"}},
            }
        )
    return layers
