"""Charts as Vega-Lite specifications, which browsers, files and notebooks show alike."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdq.evaluate.statistics import PairedInterval
from kdq.report import metric as metrics
from kdq.report.page.marks import (
    DASHED,
    Point,
    Spec,
    chart,
    dot,
    encode,
    layer,
    tight,
    tips,
    with_tips,
)
from kdq.report.page.scales import (
    GRAY,
    arm_colors,
    curve_styles,
    kind_colors,
    names_axis,
    start_shapes,
)
from kdq.tasks.metric import Metric

MOST_CLASSES = 20  # of a map of confusions that can be read
DIVERGING = ["#3b78c2", "#eeeeee", "#c9542c"]
SEQUENTIAL = ["#f7d9b0", "#4f9db8"]


def curves(points: Sequence[Point], field: str, title: str) -> Spec:
    """Returns lines over steps; the one that the pointer is on stands out.

    Args:
      points: with "arm", "kind", "step" and the field.
      field: what is drawn.
      title: of its axis.
    """
    chosen = {"condition": {"param": "arm", "empty": False, "value": 3}, "value": 1.2}
    select = {"type": "point", "fields": ["arm"], "on": "pointerover", "clear": "pointerout"}
    names = [{"field": name} for name in ("arm", "kind", "step")]
    hover = {
        "params": [{"name": "arm", "select": select}],
        "mark": dot(90, opacity=0),
        "encoding": {"tooltip": [*names, {"field": field, "title": title, "format": ".4g"}]},
    }
    return chart(
        points,
        280,
        encoding={
            "x": encode("step", axis={"grid": False}),
            "y": encode(field, title=title, scale={"zero": False}),
            **curve_styles(points),
            "detail": {"field": "arm"},
        },
        layer=[{"mark": {"type": "line"}, "encoding": {"strokeWidth": chosen}}, hover],
    )


def fidelity(points: Sequence[Point], metric: Metric, nearness: Metric) -> Spec:
    """Returns likeness to the teacher against the metric: being right is not being like it."""
    scale = tight(14, zero=False)
    return chart(
        with_tips(points),
        280,
        mark=dot(75, opacity=0.9),
        encoding={
            "x": encode("score", title=metrics.axis(metric, "test"), scale=scale),
            "y": encode("fidelity", title=metrics.likeness(nearness), scale=scale),
            "color": kind_colors(points),
            **start_shapes(points),
            "tooltip": tips(points),
        },
    )


def reliability(bins: Sequence[Point]) -> Spec:
    """Returns accuracy against confidence.

    Args:
      bins: with "arm", "confidence", "accuracy" and "count".
    """
    arms = list(dict.fromkeys(b["arm"] for b in bins))
    places = lambda x, y: {
        "x": encode(x, title="mean confidence of a bin", scale={"domain": [0, 1]}),
        "y": encode(y, title="accuracy in the bin", scale={"domain": [0, 1]}),
    }
    colored = {**places("confidence", "accuracy"), "color": arm_colors(arms)}
    size = encode("count", scale={"type": "sqrt", "range": [8, 220]}, legend=None)
    shares = [{"field": name, "format": ".3f"} for name in ("confidence", "accuracy")]
    tooltip = [{"field": "arm"}, *shares, {"field": "count", "title": "examples"}]
    diagonal = [{"x": 0, "y": 0}, {"x": 1, "y": 1}]
    point = {"type": "point", "filled": True, "opacity": 1}
    return chart(
        None,
        300,
        layer=[
            layer(diagonal, DASHED, **places("x", "y"), color={"value": GRAY}),
            layer(bins, {"type": "line", "strokeWidth": 1}, **colored),
            layer(bins, point, **colored, size=size, tooltip=tooltip),
        ],
    )


def confusion_difference(cells: Sequence[Point], most: float) -> Spec:
    """Returns mean counts of an arm less those of the teacher, class by predicted class.

    Args:
      cells: with "class", "predicted" and "difference".
      most: at the ends of the scale of colors, which several charts share.
    """
    scale = {"domain": [-most, 0, most], "range": DIVERGING}
    name = "examples more than the teacher"
    return chart(
        cells,
        220,
        mark={"type": "rect"},
        encoding={
            "x": encode("predicted", "ordinal", title="predicted", axis={"labelAngle": 0}),
            "y": encode("class", "ordinal", title="class"),
            "color": encode("difference", title="examples more", scale=scale),
            "tooltip": [
                {"field": "class"},
                {"field": "predicted"},
                {"field": "difference", "title": name, "format": "+.3g"},
            ],
        },
    )


def bits_by_layer(cells: Sequence[Point]) -> Spec:
    """Returns the policy of each arm.

    Args:
      cells: with "arm", "layer", "bits" ("W4A4") and "weight_bits", in order.
    """
    order = {key: list(dict.fromkeys(c[key] for c in cells)) for key in ("arm", "layer")}
    across, down = ("layer", "arm") if len(order["layer"]) <= 10 else ("arm", "layer")
    angle = 0 if across == "layer" else -60
    axes = {across: {**names_axis(order[across]), "labelAngle": angle}}
    axes[down] = names_axis(order[down])
    place = lambda field: encode(field, "ordinal", sort=order[field], title=None, axis=axes[field])
    scale = {"domain": [1, 8], "range": SEQUENTIAL, "clamp": True}
    color = encode("weight_bits", title="bits of weights", scale=scale)
    return chart(
        cells,
        28 * len(order[down]),
        encoding={
            "x": place(across),
            "y": place(down),
            "tooltip": [{"field": name} for name in ("arm", "layer", "bits")],
        },
        layer=[
            {"mark": {"type": "rect"}, "encoding": {"color": color}},
            {
                "mark": {"type": "text", "fontSize": 10},
                "encoding": {"text": {"field": "bits"}, "color": {"value": "#111111"}},
            },
        ],
    )


def sensitivity(cells: Sequence[Point], arms: Sequence[str], title: str) -> Spec:
    """Returns what each layer alone does to the outputs.

    Args:
      cells: with "arm", "layer", "sensitivity" [above 0] and "bits".
      arms: whose colors are as in the other charts of arms.
      title: of the axis of sensitivities.
    """
    layers = list(dict.fromkeys(c["layer"] for c in cells))
    names = [{"field": name} for name in ("arm", "layer", "bits")]
    return chart(
        cells,
        26 * len(layers),
        mark=dot(70, opacity=1),
        encoding={
            "x": encode(
                "sensitivity",
                scale=tight(12, type="log"),
                axis={"tickCount": 4, "format": ".0e"},
                title=title,
            ),
            "y": encode("layer", "ordinal", sort=layers, title=None, axis=names_axis(layers)),
            "color": arm_colors(arms),
            "tooltip": [*names, {"field": "sensitivity", "format": ".3g"}],
        },
    )


def intervals(
    differences: Mapping[str, PairedInterval], unit: str, title: str = "", color: str = "#222222"
) -> Spec:
    """Returns a line a difference: its dot is filled where the interval excludes 0, else hollow.

    Args:
      differences: by what to call them, the first on top.
      unit: title of the axis.
      title: of the chart.
      color: of all of them.
    """
    values = [
        {
            "name": name,
            "mean": each.mean,
            **({} if math.isnan(each.low) else {"low": each.low, "high": each.high}),
            "fill": color if each.excludes_zero else "white",
        }
        for name, each in differences.items()
    ]
    y = encode("name", "nominal", sort=list(differences), title=None, axis={"labelLimit": 260})
    x = lambda field: encode(field, title=unit)
    hollow = {"fill": encode("fill", "nominal", scale=None), "stroke": {"value": color}}
    bars = [v for v in values if "low" in v]
    return chart(
        None,
        20 * len(values) + 10,
        **({"title": title} if title else {}),
        layer=[
            layer([{"zero": 0}], {"type": "rule"}, x=x("zero"), color={"value": GRAY}),
            *(
                [layer(bars, "rule", x=x("low"), x2={"field": "high"}, y=y, color={"value": color})]
                if bars
                else []
            ),
            layer(values, {"type": "point", "size": 50, "opacity": 1}, x=x("mean"), y=y, **hollow),
        ],
    )


def plot(
    values: Sequence[Point], mark: Spec | str, x: Spec, y: Spec, color: str = "", **parts: Any
) -> Spec:
    """Returns one kind of mark for all values, in the colors of arms by the field `color`.

    Args:
      values: with the fields of the encodings.
      mark: "line", "bar", "rect", ..., or the mark with its options.
      x: an encoding.
      y: another.
      color: a field; "" is one color.
      parts: further encodings as "encoding"; "title", "width" and "height" of the chart; "spread":
        the two fields between which a line stands through each mark.
    """
    encoding = {"x": x, "y": y, **parts.pop("encoding", {})}
    spread, height = parts.pop("spread", ()), parts.pop("height", 220)
    if color:
        names = list(dict.fromkeys(value[color] for value in values))
        encoding["color"] = {**arm_colors(names), "field": color}
    chart_ = chart(values, height, mark=mark, encoding=encoding)
    if not spread:
        return chart_ | parts
    ends = {"y": {**y, "field": spread[0]}, "y2": {"field": spread[1]}}
    return overlay({**chart_, "mark": "rule", "encoding": encoding | ends}, chart_, **parts)


def heat(cells: Sequence[Point], x: str, y: str, color: Spec, text: str = "", **parts: Any) -> Spec:
    """Returns a map of rectangles, in the order of the cells.

    Args:
      cells: with the fields.
      x: the field that stands across.
      y: the field that stands down.
      color: an encoding of numbers.
      text: a field that is written in each cell; "" writes none.
      parts: as of `plot`.
    """
    axes = parts.pop("axes", {"axis": {"labelAngle": 0}})
    places = [encode(field, "ordinal", sort=None, title=None, **axes) for field in (x, y)]
    height = 24 * len({cell[y] for cell in cells})
    parts = {"height": height, **parts}
    colored = plot(cells, "rect", *places, encoding={"color": color}, **parts)
    if not text:
        return colored
    words = {"text": {"field": text}, "color": {"value": "#111111"}}
    return overlay(colored, plot(cells, "text", *places, encoding=words), **parts)


def overlay(*charts: Spec, **parts: Any) -> Spec:
    """Returns charts on top of each other, on the same axes."""
    height = parts.pop("height", charts[0].get("height", 220))
    layers = [{k: v for k, v in c.items() if k in ("data", "mark", "encoding")} for c in charts]
    return chart(None, height, layer=layers, **parts)
