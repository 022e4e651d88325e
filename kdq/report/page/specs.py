"""Charts as Vega-Lite specifications, which browsers and `draw` render alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdq.report.page.scales import names_axis, of_arms, of_curves, of_kinds, of_starts

Spec = dict[str, Any]
Point = Mapping[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
MOST_CLASSES = 20  # of a map of confusions that can be read


def tips(points: Sequence[Point]) -> list[dict[str, str]]:
    """Returns the tooltip of a point: all that it has under "tip"."""
    names = dict.fromkeys(key for p in points for key in p["tip"])
    return [{"field": _field(name), "title": name} for name in names]


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
            **of_curves(points),
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
    return {
        "$schema": SCHEMA,
        "data": {"values": [{k: v for k, v in p.items() if k != "tip"} | p["tip"] for p in points]},
        "height": 280,
        "mark": {"type": "point", "filled": True, "size": 75, "opacity": 0.9},
        "encoding": {
            "x": {**axis, "field": "accuracy", "title": "test accuracy, %"},
            "y": {**axis, "field": "agreement", "title": "agreement with the teacher, %"},
            "color": of_kinds(points),
            **of_starts(points),
            "tooltip": tips(points),
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


def confusion_difference(cells: Sequence[Point], most: float) -> Spec:
    """Mean counts of an arm less those of the teacher, class by predicted class.

    Args:
      cells: with "class", "predicted" and "difference".
      most: at the ends of the scale of colors, which several charts share.
    """
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
        "axis": {**names_axis(order[field]), **axis},
    }
    return {
        "$schema": SCHEMA,
        "data": {"values": list(cells)},
        "height": 28 * len(order[down]),
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
            "y": {
                "field": "layer",
                "type": "ordinal",
                "sort": layers,
                "title": None,
                "axis": names_axis(layers),
            },
            "color": of_arms(arms),
            "tooltip": [
                {"field": "arm"},
                {"field": "layer"},
                {"field": "bits"},
                {"field": "sensitivity", "format": ".3g"},
            ],
        },
    }
