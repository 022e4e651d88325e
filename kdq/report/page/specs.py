"""Charts as Vega-Lite specifications, which browsers and `draw` render alike."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdq.report.front import pareto_front, side_by_side, zoom_floor
from kdq.report.page.scales import of_arms, of_kinds

Spec = dict[str, Any]
Point = Mapping[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
FAR = 4  # times the cost of any other: a teacher that a second chart leaves out
MOST_CLASSES = 20  # of a map of confusions that can be read


def pareto(points: Sequence[Point], cost: str, title: str) -> list[Spec]:
    """Accuracy against a cost, and a second chart of the best where others collapsed.

    Args:
      points: with "accuracy" [percent], "low" and "high" (None of one seed), "kind", "bits", the
        cost, and what a tooltip is to show under "tip".
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


def _labelled(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Points of the front have their bits written above them, where there is room."""
    logs = [math.log(p["x"]) for p in points]
    room = 0.09 * (max(logs) - min(logs))
    found, last = [], -math.inf
    for place, point in sorted(zip(logs, points, strict=True), key=lambda pair: pair[0]):
        fits = point["front"] and place - last >= room and len(point["bits"]) <= 6
        last = place if fits else last
        found.append({**point, "label": point["bits"] if fits else ""})
    return found


def _pareto(points: Sequence[Point], title: str, subtitle: str, base: int) -> Spec:
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": {"type": "log", "base": base, "nice": False, "padding": 16},
        "axis": {"grid": False, "tickCount": 6, "format": ",~r"},
        "title": title,
    }
    one_seed = all(p["low"] is None for p in points)
    of_y = "test accuracy, %" if one_seed else "test accuracy, %, with 95% intervals"
    y = {"type": "quantitative", "scale": {"zero": False, "nice": False, "padding": 18}}
    labelled = _labelled(points)
    values = [{k: v for k, v in p.items() if k != "tip"} | p["tip"] for p in labelled]
    tips = list(dict.fromkeys(key for p in points for key in p["tip"]))
    spec = {
        "$schema": SCHEMA,
        "title": subtitle,
        "data": {"values": values},
        "encoding": {"x": x},
        "height": 300,
        "layer": [
            {
                "transform": [{"filter": "datum.front"}],
                "mark": {"type": "line", "interpolate": "step-after", "strokeDash": [4, 3]},
                "encoding": {
                    "y": {**y, "field": "accuracy", "title": of_y},
                    "color": {"value": "#888888"},
                },
            },
            {
                "transform": [{"filter": "datum.low != null"}],
                "mark": {"type": "rule", "strokeWidth": 1.3},
                "encoding": {
                    "y": {**y, "field": "low", "title": of_y},
                    "y2": {"field": "high"},
                    "color": of_kinds(points)["color"],
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {
                    "y": {**y, "field": "accuracy"},
                    **of_kinds(points),
                    "tooltip": [{"field": _field(t), "title": t} for t in tips],
                },
            },
            {
                "transform": [{"filter": "datum.label != ''"}],
                "mark": {"type": "text", "dy": -14, "fontSize": 10},
                "encoding": {"y": {**y, "field": "accuracy"}, "text": {"field": "label"}},
            },
        ],
    }
    if one_seed:
        del spec["layer"][1]  # Vega warns of a scale of nothing
    return spec


def _field(name: str) -> str:
    """A key as a field's name, in which dots and brackets would be paths."""
    for char in "\\.[]'\"":
        name = name.replace(char, f"\\{char}")
    return name


def curves(points: Sequence[Point], field: str, title: str) -> Spec:
    """Lines over steps; what the pointer is on stands out.

    Args:
      points: with "arm", "kind", "step" and the field.
      field: what is drawn.
      title: of its axis.
    """
    chosen = {"condition": {"param": "arm", "empty": False, "value": 3}, "value": 1.2}
    return {
        "$schema": SCHEMA,
        "data": {"values": list(points)},
        "height": 280,
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "axis": {"grid": False}},
            "y": {
                "field": field,
                "type": "quantitative",
                "title": title,
                "scale": {"zero": False},
            },
            "color": of_kinds(points)["color"],
            "detail": {"field": "arm"},
        },
        "layer": [
            {"mark": {"type": "line"}, "encoding": {"strokeWidth": chosen}},
            {
                "params": [
                    {
                        "name": "arm",
                        "select": {
                            "type": "point",
                            "fields": ["arm"],
                            "on": "pointerover",
                            "clear": "pointerout",
                        },
                    }
                ],
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 0},
                "encoding": {
                    "tooltip": [
                        {"field": "arm"},
                        {"field": "kind"},
                        {"field": "step"},
                        {"field": field, "title": title, "format": ".4g"},
                    ]
                },
            },
        ],
    }


def fidelity(points: Sequence[Point]) -> Spec:
    """Agreement with the teacher against accuracy: being right is not being like it."""
    axis = {"type": "quantitative", "scale": {"zero": False, "nice": False, "padding": 14}}
    tips = list(dict.fromkeys(key for p in points for key in p["tip"]))
    return {
        "$schema": SCHEMA,
        "data": {"values": [{k: v for k, v in p.items() if k != "tip"} | p["tip"] for p in points]},
        "height": 280,
        "mark": {"type": "point", "filled": True, "size": 75, "opacity": 0.9},
        "encoding": {
            "x": {**axis, "field": "accuracy", "title": "test accuracy, %"},
            "y": {**axis, "field": "agreement", "title": "agreement with the teacher, %"},
            **of_kinds(points),
            "tooltip": [{"field": _field(t), "title": t} for t in tips],
        },
    }


def reliability(bins: Sequence[Point]) -> Spec:
    """Accuracy against confidence.

    Args:
      bins: with "arm", "confidence", "accuracy" and "count".
    """
    arms = list(dict.fromkeys(b["arm"] for b in bins))
    unit = {"scale": {"domain": [0, 1]}, "type": "quantitative"}
    titles = ("mean confidence of a bin", "accuracy in the bin")
    return {
        "$schema": SCHEMA,
        "height": 300,
        "layer": [
            {
                "data": {"values": [{"x": 0, "y": 0}, {"x": 1, "y": 1}]},
                "mark": {"type": "line", "strokeDash": [4, 3]},
                "encoding": {
                    "x": {**unit, "field": "x", "title": titles[0]},
                    "y": {**unit, "field": "y", "title": titles[1]},
                    "color": {"value": "#888888"},
                },
            },
            {
                "data": {"values": list(bins)},
                "mark": {"type": "line", "strokeWidth": 1},
                "encoding": {
                    "x": {**unit, "field": "confidence", "title": titles[0]},
                    "y": {**unit, "field": "accuracy", "title": titles[1]},
                    "color": of_arms(arms),
                },
            },
            {
                "data": {"values": list(bins)},
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": {
                    "size": {
                        "field": "count",
                        "type": "quantitative",
                        "scale": {"type": "sqrt", "range": [8, 220]},
                        "legend": None,
                    },
                    "x": {**unit, "field": "confidence", "title": titles[0]},
                    "y": {**unit, "field": "accuracy", "title": titles[1]},
                    "color": of_arms(arms),
                    "tooltip": [
                        {"field": "arm"},
                        {"field": "confidence", "format": ".3f"},
                        {"field": "accuracy", "format": ".3f"},
                        {"field": "count", "title": "examples"},
                    ],
                },
            },
        ],
    }


def confusion_difference(cells: Sequence[Point]) -> Spec:
    """Mean counts of an arm less those of the teacher, class by predicted class.

    Args:
      cells: with "class", "predicted" and "difference".
    """
    most = max((abs(c["difference"]) for c in cells), default=0) or 1
    return {
        "$schema": SCHEMA,
        "data": {"values": list(cells)},
        "height": 220,
        "mark": {"type": "rect"},
        "encoding": {
            "x": {
                "field": "predicted",
                "type": "ordinal",
                "title": "predicted",
                "axis": {"labelAngle": 0},
            },
            "y": {"field": "class", "type": "ordinal", "title": "class"},
            "color": {
                "field": "difference",
                "type": "quantitative",
                "title": "examples more",
                "scale": {"domain": [-most, 0, most], "range": ["#3b78c2", "#eeeeee", "#c9542c"]},
            },
            "tooltip": [
                {"field": "class"},
                {"field": "predicted"},
                {
                    "field": "difference",
                    "title": "examples more than the teacher",
                    "format": "+.3g",
                },
            ],
        },
    }


def bits_by_layer(cells: Sequence[Point]) -> Spec:
    """The policy of each arm.

    Args:
      cells: with "arm", "layer", "bits" ("W4A4") and "weight_bits", in order.
    """
    arms, layers = (list(dict.fromkeys(c[key] for c in cells)) for key in ("arm", "layer"))
    across, down = ("layer", "arm") if len(layers) <= 10 else ("arm", "layer")
    order = {"arm": arms, "layer": layers}
    place = lambda field, **axis: {
        "field": field,
        "type": "ordinal",
        "sort": order[field],
        "title": None,
        "axis": {"labelLimit": 130, **axis},
    }
    return {
        "$schema": SCHEMA,
        "data": {"values": list(cells)},
        "height": 24 * len(order[down]),
        "encoding": {
            "x": place(across, labelAngle=0 if across == "layer" else -60),
            "y": place(down),
            "tooltip": [{"field": "arm"}, {"field": "layer"}, {"field": "bits"}],
        },
        "layer": [
            {
                "mark": {"type": "rect"},
                "encoding": {
                    "color": {
                        "field": "weight_bits",
                        "type": "quantitative",
                        "title": "bits of weights",
                        "scale": {"domain": [1, 8], "range": ["#f7d9b0", "#4f9db8"], "clamp": True},
                    }
                },
            },
            {
                "mark": {"type": "text", "fontSize": 10},
                "encoding": {"text": {"field": "bits"}, "color": {"value": "#111111"}},
            },
        ],
    }


def sensitivity(cells: Sequence[Point], arms: Sequence[str]) -> Spec:
    """What each layer alone does to the outputs.

    Args:
      cells: with "arm", "layer", "sensitivity" [nats, above 0] and "bits".
      arms: whose colors are as in the other charts of arms.
    """
    layers = list(dict.fromkeys(c["layer"] for c in cells))
    return {
        "$schema": SCHEMA,
        "data": {"values": list(cells)},
        "height": 26 * len(layers),
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
        "encoding": {
            "x": {
                "field": "sensitivity",
                "type": "quantitative",
                "scale": {"type": "log", "nice": False, "padding": 12},
                "axis": {"tickCount": 4, "format": ".0e"},
                "title": "KL with this layer alone quantized, nats",
            },
            "y": {"field": "layer", "type": "ordinal", "sort": layers, "title": None},
            "color": of_arms(arms),
            "tooltip": [
                {"field": "arm"},
                {"field": "layer"},
                {"field": "bits"},
                {"field": "sensitivity", "format": ".3g"},
            ],
        },
    }
