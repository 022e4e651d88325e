"""Charts as Vega-Lite specifications, which browsers, files and notebooks show alike.

Those of the page are `template/charts.json`, in which "$name" stands for a value; notebooks build
theirs of `encode`, `plot`, `heat` and `overlay`. Kinds and arms have the same colors everywhere.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdq.evaluate.statistics import PairedInterval

Spec = dict[str, Any]
Point = Mapping[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
# Okabe and Ito's palette, which the color-blind can tell apart; kinds have shapes as well.
COLORS = {
    "teacher": "#777777",
    "labels": "#999933",
    "KD": "#56b4e9",
    "PTQ": "#e69f00",
    "QAT": "#009e73",
    "QAD": "#d55e00",
}
SPARE_COLORS = ("#0072b2", "#cc79a7", "#b8a800")
SEQUENTIAL = ["#f7d9b0", "#4f9db8"]
GRAY = "#888888"
NARROW = 420  # pixels of a chart below which it is one of a phone
LABEL = 200  # pixels of a name in a legend or at an axis
LONG = 18  # letters of a name above which an axis breaks it
SHAPES = (
    *("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"),
    "triangle-left",
)
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 2, 1, 2])
MOST_CURVES = 36  # that a legend can name
SHADES = 0.3  # how far a kind's color goes to black and to white for its first and last arm


@functools.cache
def _charts() -> dict[str, Spec]:
    return json.loads(Path(__file__).parents[1].joinpath("template", "charts.json").read_text())


def fill(name: str, /, **values: Any) -> Spec:
    """Returns a part of charts.json with values in the place of "$name"."""

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: filled(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [filled(inner) for inner in part]
        is_name = isinstance(part, str) and part.startswith("$")
        return values[part[1:]] if is_name else part

    return filled(_charts()[name])


def chart(name: str, /, **values: Any) -> Spec:
    """Returns a chart of charts.json."""
    return {"$schema": SCHEMA, **fill(name, **values)}


def curves(points: Sequence[Point], field: str, title: str) -> Spec:
    """Returns lines over the "step" of points of the "kind" of an "arm"; `title` is the field's.

    A line has a shade of its kind's color, and dashes of its own; of more arms than a legend can
    name, the color of the kind alone. The one that the pointer is on stands out.
    """
    spec = chart("curves", points=points, field=field, title=title)
    kinds = {p["arm"]: p["kind"] for p in points}
    if len(kinds) > MOST_CURVES:
        spec["encoding"]["color"] = kind_colors(points)
        return spec
    scale = kind_colors(points)["scale"]
    base = dict(zip(scale["domain"], scale["range"], strict=True))
    arms = sorted(kinds, key=lambda arm: scale["domain"].index(kinds[arm]))
    colors, dashes = [], []
    for arm in arms:
        same = [other for other in arms if kinds[other] == kinds[arm]]
        place = same.index(arm)
        colors.append(_shade(base[kinds[arm]], place, len(same)))
        dashes.append(DASHES[place % len(DASHES)])
    columns = {"expr": f"width < {NARROW} ? 2 : 4"}
    legend = {"columns": columns, "symbolType": "stroke", "symbolSize": 500, "labelLimit": LABEL}
    shared = {"field": "arm", "type": "nominal", "title": None, "legend": legend, "sort": arms}
    for channel, values in (("color", colors), ("strokeDash", dashes)):
        spec["encoding"][channel] = {**shared, "scale": {"domain": arms, "range": values}}
    return spec


def bits_by_layer(cells: Sequence[Point]) -> Spec:
    """Returns the policies of arms: cells have "arm", "layer", "bits" ("W4A4"), "weight_bits"."""
    order = {key: list(dict.fromkeys(c[key] for c in cells)) for key in ("arm", "layer")}
    across, down = ("layer", "arm") if len(order["layer"]) <= 10 else ("arm", "layer")
    axes = {key: names_axis(names) for key, names in order.items()}
    axes[across]["labelAngle"] = 0 if across == "layer" else -60
    place = lambda field: encode(field, "ordinal", sort=order[field], title=None, axis=axes[field])
    height = 28 * len(order[down])
    return chart("bits", cells=cells, height=height, x=place(across), y=place(down))


def sensitivity(cells: Sequence[Point], arms: Sequence[str], title: str) -> Spec:
    """Returns what each layer alone does to the outputs; `title` is of the axis of sensitivities.

    Cells have "arm", "layer", "sensitivity" [above 0] and "bits".
    """
    layers = list(dict.fromkeys(c["layer"] for c in cells))
    values = {"cells": cells, "layers": layers, "title": title, "arms": arm_colors(arms)}
    return chart("sensitivity", height=26 * len(layers), axis=names_axis(layers), **values)


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
    bars, height = [v for v in values if "low" in v], 20 * len(values) + 10
    shown = {"values": values, "bars": bars, "y": y, "color": color, "unit": unit}
    spec = chart("intervals", height=height, **shown)
    if not bars:
        del spec["layer"][1]
    return spec | ({"title": title} if title else {})


def arm_values(points: Sequence[Point]) -> dict[str, Any]:
    """Returns the values of a chart of arms: their points, colors, shapes and tooltips ("tip")."""
    names = dict.fromkeys(key for p in points for key in p["tip"])
    # Dots and brackets in the name of a field would be paths.
    escaped = {n: "".join(f"\\{c}" if c in "\\.[]'\"" else c for c in n) for n in names}
    return {
        "points": [{k: v for k, v in p.items() if k != "tip"} | p["tip"] for p in points],
        "kinds": kind_colors(points),
        "starts": start_shapes(points),
        "tips": [{"field": escaped[name], "title": name} for name in names],
    }


def kind_colors(points: Sequence[Point]) -> Spec:
    """Returns the color of the "kind" of each point: the same in every chart of every report."""
    kinds = {p["kind"] for p in points}
    known, other = [kind for kind in COLORS if kind in kinds], sorted(kinds - COLORS.keys())
    spare = [SPARE_COLORS[i % len(SPARE_COLORS)] for i in range(len(other))]
    scale = {"domain": [*known, *other], "range": [*(COLORS[k] for k in known), *spare]}
    return {"field": "kind", "type": "nominal", "scale": scale, "title": "kind"}


def arm_colors(arms: Sequence[str]) -> Spec:
    """Returns the color of each arm, for the few that a chart shows."""
    colors = [*COLORS.values(), *SPARE_COLORS]
    scale = {"domain": list(arms), "range": [colors[i % len(colors)] for i in range(len(arms))]}
    legend = {"columns": 2, "labelLimit": LABEL}
    return {"field": "arm", "type": "nominal", "title": None, "legend": legend, "scale": scale}


def start_shapes(points: Sequence[Point]) -> Spec:
    """Returns shapes of what arms start from; those beyond the shapes share the last one."""
    starts = list(dict.fromkeys(p["start"] for p in points))
    shapes = [SHAPES[min(i, len(SHAPES) - 1)] for i in range(len(starts))]
    scale = {"domain": starts, "range": shapes}
    legend = {"symbolFillColor": GRAY, "symbolStrokeColor": GRAY} if starts[1:] else None
    return encode("start", "nominal", title="starts from", scale=scale, legend=legend)


def _shade(color: str, place: int, count: int) -> str:
    """Returns a color made darker for the first of so many places, lighter for the last."""
    if count == 1:
        return color
    share = SHADES * (2 * place / (count - 1) - 1)
    end = 255 if share > 0 else 0
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + abs(share) * (end - c)):02x}" for c in parts)


def names_axis(names: Sequence[str]) -> Spec:
    """Returns an axis whose long names are broken in two at a separator near their middle."""
    broken = {}
    for name in (name for name in names if len(name) > LONG):
        if ends := [i + 1 for i, char in enumerate(name[:-1]) if char in "_-/."]:
            half = min(ends, key=lambda end, name=name: abs(2 * end - len(name)))
            broken[name] = [name[:half], name[half:]]
    if not broken:
        return {"labelLimit": LABEL}
    known = f"({json.dumps(broken, ensure_ascii=True)})[datum.value]"
    # Of two lines the upper one would be where the only one is.
    raised = {"condition": {"test": f"isArray({known})", "value": -6}, "value": 0}
    return {"labelLimit": LABEL, "labelExpr": f"{known} || datum.value", "labelOffset": raised}


def encode(field: str, kind: str = "quantitative", **options: Any) -> Spec:
    """Returns the encoding of a field, "quantitative", "ordinal" or "nominal"."""
    return {"field": field, "type": kind, **options}


def dot(size: int, **options: Any) -> Spec:
    """Returns a filled point of so many square pixels."""
    return {"type": "point", "filled": True, "size": size, **options}


def layer(values: Sequence[Point], mark: Spec | str, **encoding: Any) -> Spec:
    """Returns a layer of a chart with points of its own."""
    return {"data": {"values": list(values)}, "mark": mark, "encoding": encoding}


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
    spec = {"$schema": SCHEMA, "height": height, **layer(values, mark, **encoding)}
    if not spread:
        return spec | parts
    ends = {"y": {**y, "field": spread[0]}, "y2": {"field": spread[1]}}
    return overlay({**spec, "mark": "rule", "encoding": encoding | ends}, spec, **parts)


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
    parts = {"height": 24 * len({cell[y] for cell in cells}), **parts}
    colored = plot(cells, "rect", *places, encoding={"color": color}, **parts)
    if not text:
        return colored
    words = {"text": {"field": text}, "color": {"value": "#111111"}}
    return overlay(colored, plot(cells, "text", *places, encoding=words), **parts)


def overlay(*charts: Spec, **parts: Any) -> Spec:
    """Returns charts on top of each other, on the same axes."""
    height = parts.pop("height", charts[0].get("height", 220))
    layers = [{k: v for k, v in c.items() if k in ("data", "mark", "encoding")} for c in charts]
    return {"$schema": SCHEMA, "height": height, "layer": layers, **parts}
