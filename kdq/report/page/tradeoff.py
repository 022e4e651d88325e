"""The trade-off as a chart: the metric against a cost, the frontier, which arm each point is.

Labels are placed so that they cover neither each other nor other points.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from kdq.report import metric as metrics
from kdq.report.front import pareto_front, side_by_side, zoom_floor
from kdq.report.page.specs import Point, Spec, arm_values, chart, fill
from kdq.tasks.metric import Metric

FAR = 4  # times the cost of any other: a teacher that a second chart leaves out
WIDE_LABELS, NARROW_LABELS = "labels_wide", "labels_narrow"  # names of layers
# Of a chart: its width beside another one on a page, and on a phone; its height; in pixels.
WIDE, NARROW, HEIGHT, PADDING = 490, 260, 340, 17
CHAR, LINE = 6.8, 12  # of a letter and of a line of text
MARKER = 5  # half of a point's
GAP = 8  # between a point and its label
NEAR = 60  # pixels within which the same text is not written twice
LAST = 2  # rank of a label that may be missing


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
    # The worse end of an interval, higher for the better arm.
    sign, end = (1, "low") if metric.higher_is_better else (-1, "high")
    worst = lambda p: sign * (p["score"] if p[end] is None else p[end])
    # What collapsed, and a teacher far to the right, would hide what is between them.
    best = shown
    while (floor := zoom_floor([worst(p) for p in best])) is not None:
        best = [p for p in best if worst(p) >= floor]
    students, aside = [p for p in best if p["kind"] != "teacher"], ""
    reach = FAR * max((p[cost] for p in students), default=math.inf)
    if len(students) > 2 and any(p[cost] > reach for p in best):
        best, aside = students, ", the teacher aside"
    parts = [(shown, f"all {len(shown)} arms")]
    if len(best) < len(shown):
        parts.append((best, f"the best {len(best)} of {len(shown)}{aside}"))
    specs = []
    for values, subtitle in parts:
        places = side_by_side([p[cost] for p in values])
        front = set(pareto_front([(p[cost], sign * p["score"]) for p in values]))
        both = enumerate(zip(values, places, strict=True))
        placed = [{**p, "x": x, "front": i in front} for i, (p, x) in both]
        one_seed = all(p["low"] is None for p in placed)
        up = metrics.axis(metric, "test") + ("" if one_seed else ", with 95% intervals")
        base = 2 if cost == "size" else 10
        titles = {"across": title, "up": up, "subtitle": subtitle}
        spec = chart("tradeoff", base=base, **titles, **arm_values(placed))
        if one_seed:
            del spec["layer"][1]  # Vega warns of a scale of nothing: no bars of one seed
        spec["layer"] += _texts(placed)
        specs.append(spec)
    return specs


def _texts(points: Sequence[Point]) -> list[Spec]:
    """Labels arms of the frontier by their names, others by their bits, where there is room.

    A layer for each width of a chart, of which `draw` and the page choose one.
    """
    weight = lambda p: "bold" if p["front"] else "normal"
    labels = [{"x": p["x"], "score": p["score"], "weight": weight(p)} for p in points]
    texts = [p["arm"] if p["front"] else p["bits"] for p in points]
    ranks = [1 if p["front"] else LAST for p in points]
    # The frontier is named at the middle of its longest level part.
    front = sorted((p for p in points if p["front"]), key=lambda p: p["x"])
    steps = [(b["x"] / a["x"], a, b) for a, b in itertools.pairwise(front)]
    if steps:
        _, start, end = max(steps, key=lambda step: step[0])
        middle = math.sqrt(start["x"] * end["x"])
        labels.append({"x": middle, "score": start["score"], "weight": "normal"})
        texts.append("frontier")
        ranks.append(0)
    logs = [math.log(p["x"]) for p in points]
    ends = [v for p in points for v in (p["low"], p["high"], p["score"]) if v is not None]
    places = [
        (_share(math.log(each["x"]), logs), 1 - _share(each["score"], ends)) for each in labels
    ]
    layers = []
    for name, width in ((WIDE_LABELS, WIDE), (NARROW_LABELS, NARROW)):
        placed = place_labels(places, texts, ranks, width)
        values = [a | b for a, b in zip(labels, placed, strict=True) if b["label"]]
        layers.append(fill("labels", name=name, values=values))
    return layers


def _share(value: float, ends: Sequence[float]) -> float:
    """Returns where a value lies between the least and the greatest of `ends`, from 0 to 1."""
    return (value - min(ends)) / (max(ends) - min(ends) or 1.0)


def place_labels(
    places: Sequence[tuple[float, float]], texts: Sequence[str], ranks: Sequence[int], width: float
) -> list[dict[str, Any]]:
    """Returns the text of each point, "" where it has no room, and where it stands.

    Args:
      places: of the points, as shares of the chart's width and of its height from above.
      texts: what to write beside them.
      ranks: those of the least are placed first, and those of LAST only close by and not twice.
      width: of the chart.

    Returns:
      {"label", "dx", "dy", "align"} a point, in pixels from it.
    """
    across, down = width - 2 * PADDING, HEIGHT - 2 * PADDING
    centers = [(PADDING + x * across, PADDING + y * down) for x, y in places]
    # Boxes are (left, top, right, bottom).
    taken = [(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in centers]
    overlap = lambda a, b: a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    written: list[tuple[str, float, float]] = []
    labels = [{"label": "", "dx": 0, "dy": 0, "align": "center"} for _ in places]
    for i in sorted(range(len(places)), key=lambda i: (ranks[i], centers[i])):
        x, y = centers[i]
        again = any(t == texts[i] and math.dist((x, y), at) < NEAR for t, *at in written)
        if again and ranks[i] == LAST:
            continue
        others = taken[:i] + taken[i + 1 :]
        for dx, dy, align in _around(lines=1 if ranks[i] == LAST else 3):
            long = len(texts[i]) * CHAR
            left = x + dx - {"left": 0, "center": long / 2, "right": long}[align]
            box = (left, y + dy - LINE / 2, left + long, y + dy + LINE / 2)
            inside = left >= 0 and box[2] <= width and box[1] >= -LINE / 2 and box[3] <= HEIGHT
            if inside and not any(overlap(box, other) for other in others):
                labels[i] = {"label": texts[i], "dx": dx, "dy": dy, "align": align}
                taken.append(box)
                written.append((texts[i], x, y))
                break
    return labels


def _around(lines: int) -> Iterator[tuple[int, int, str]]:
    """Yields shifts and alignments, the best first: close by, then so many lines away."""
    for away in range(1, lines + 1):
        up = round(GAP + (away - 0.5) * LINE)
        yield from ((0, -up, "center"), (0, up, "center"))
        yield from ((GAP, -up + LINE, "left"), (-GAP, -up + LINE, "right"))
        yield from ((GAP, up - LINE, "left"), (-GAP, up - LINE, "right"))
