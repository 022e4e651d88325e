"""The trade-off as a chart: the metric against a cost, the frontier, which arm each point is."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from kdq.report import metric as metrics
from kdq.report.front import pareto_front, side_by_side, zoom_floor
from kdq.report.page.labels import LAST, NARROW, WIDE, place_labels
from kdq.report.page.marks import (
    DASHED,
    NARROW_LABELS,
    WIDE_LABELS,
    Point,
    Spec,
    chart,
    dot,
    encode,
    tight,
    tips,
    with_tips,
)
from kdq.report.page.scales import GRAY, kind_colors, start_shapes
from kdq.tasks.metric import Metric

FAR = 4  # times the cost of any other: a teacher that a second chart leaves out


def pareto(points: Sequence[Point], cost: str, title: str, metric: Metric) -> list[Spec]:
    """Returns the metric against a cost, and a second chart of the best where others collapsed.

    Args:
      points: with "score" [as the metric is shown], "low" and "high" (None of one seed), "kind",
        "bits", "start", the cost, and what a tooltip is to show under "tip".
      cost: its key; above 0.
      title: of its axis.
      metric: of the scores.
    """
    shown = [p for p in points if (p.get(cost) or 0) > 0 and p["score"] is not None]
    if not shown:
        return []
    best, worst = shown, lambda p: _worst_end(p, metric)
    # What collapsed, and a teacher far to the right, would hide what is between them.
    while (floor := zoom_floor([worst(p) for p in best])) is not None:
        best = [p for p in best if worst(p) >= floor]
    students, aside = [p for p in best if p["kind"] != "teacher"], ""
    reach = FAR * max((p[cost] for p in students), default=math.inf)
    if len(students) > 2 and any(p[cost] > reach for p in best):
        best, aside = students, ", the teacher aside"
    parts = [(shown, f"all {len(shown)} arms")]
    if len(best) < len(shown):
        parts.append((best, f"the best {len(best)} of {len(shown)}{aside}"))
    base = 2 if cost == "size" else 10
    return [
        _pareto(_placed(values, cost, metric), title, subtitle, base, metric)
        for values, subtitle in parts
    ]


def _placed(points: Sequence[Point], cost: str, metric: Metric) -> list[dict[str, Any]]:
    """Adds the place "x", and whether an arm is on the "front"."""
    sign = 1 if metric.higher_is_better else -1
    places = side_by_side([p[cost] for p in points])
    front = set(pareto_front([(p[cost], sign * p["score"]) for p in points]))
    both = zip(points, places, strict=True)
    return [{**p, "x": x, "front": i in front} for i, (p, x) in enumerate(both)]


def _worst_end(point: Point, metric: Metric) -> float:
    """Returns the worse end of an interval, higher for the better one."""
    if metric.higher_is_better:
        return point["score"] if point["low"] is None else point["low"]
    return -(point["score"] if point["high"] is None else point["high"])


def _shares(values: Sequence[float], ends: Iterable[float]) -> list[float]:
    """Returns where values lie between the least and the greatest of `ends`, from 0 to 1."""
    ends = list(ends)
    low, span = min(ends), max(ends) - min(ends) or 1.0
    return [(value - low) / span for value in values]


def _longest_step(points: Sequence[Point]) -> tuple[float, float] | None:
    """Returns the middle of the longest level part of the frontier, in the units of the data."""
    front = sorted((p for p in points if p["front"]), key=lambda p: p["x"])
    steps = [(b["x"] / a["x"], a, b) for a, b in itertools.pairwise(front)]
    if not steps:
        return None
    _, start, end = max(steps, key=lambda step: step[0])
    return math.sqrt(start["x"] * end["x"]), start["score"]


def _pareto(points: Sequence[Point], title: str, subtitle: str, base: int, metric: Metric) -> Spec:
    one_seed = all(p["low"] is None for p in points)
    y_title = metrics.axis(metric, "test") + ("" if one_seed else ", with 95% intervals")
    scale = tight(18, zero=False)
    y = lambda field, **options: encode(field, scale=scale, **options)
    front = {
        "transform": [{"filter": "datum.front"}],
        "mark": {**DASHED, "interpolate": "step-after"},
        "encoding": {"y": y("score", title=y_title), "color": {"value": GRAY}},
    }
    bars = {
        "transform": [{"filter": "datum.low != null"}],
        "mark": {"type": "rule", "strokeWidth": 1.3},
        "encoding": {
            "y": y("low", title=y_title),
            "y2": {"field": "high"},
            "color": kind_colors(points),
        },
    }
    dots = {
        "mark": dot(75, opacity=1),
        "encoding": {
            "y": y("score"),
            "color": kind_colors(points),
            **start_shapes(points),
            "tooltip": tips(points),
        },
    }
    axis = {"grid": False, "tickCount": 6, "format": ",~r", "labelOverlap": "greedy"}
    x = encode("x", scale=tight(16, type="log", base=base), axis=axis, title=title)
    return chart(
        with_tips(points),
        340,
        title=subtitle,
        encoding={"x": x},
        # Vega warns of a scale of nothing: no bars of one seed.
        layer=[front, *([] if one_seed else [bars]), dots, *_texts(points, y("score"))],
    )


def _texts(points: Sequence[Point], y: Spec) -> list[Spec]:
    """Labels arms of the frontier by their names, others by their bits, where there is room.

    A layer for each width of a chart, of which `draw` and the page choose one.
    """
    logs = [math.log(p["x"]) for p in points]
    ends = [v for p in points for v in (p["low"], p["high"], p["score"]) if v is not None]
    across = _shares(logs, logs)
    up = _shares([p["score"] for p in points], ends)
    places = [(x, 1 - y) for x, y in zip(across, up, strict=True)]
    labels = [
        {"x": p["x"], "score": p["score"], "weight": "bold" if p["front"] else "normal"}
        for p in points
    ]
    texts = [p["arm"] if p["front"] else p["bits"] for p in points]
    ranks = [1 if p["front"] else LAST for p in points]
    if middle := _longest_step(points):
        x, score = middle
        labels.append({"x": x, "score": score, "weight": "normal"})
        share = (math.log(x) - min(logs)) / (max(logs) - min(logs) or 1.0)
        places.append((share, 1 - _shares([score], ends)[0]))
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
                "encoding": {"y": y, "text": {"field": "label"}},
            }
        )
    return layers
