"""Parts that all charts are made of: encodings, marks and charts of Vega-Lite."""

from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
Point = Mapping[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
WIDE_LABELS, NARROW_LABELS = "labels_wide", "labels_narrow"  # names of layers
DASHED = {"type": "line", "strokeDash": [4, 3]}


def chart(values: Sequence[Point] | None, height: int, **parts: Any) -> Spec:
    """Returns a chart of points; None where each of its layers has its own."""
    data = {} if values is None else {"data": {"values": list(values)}}
    return {"$schema": SCHEMA, **data, "height": height, **parts}


def layer(values: Sequence[Point], mark: Spec | str, **encoding: Any) -> Spec:
    """Returns a layer of a chart with points of its own."""
    return {"data": {"values": list(values)}, "mark": mark, "encoding": encoding}


def encode(field: str, kind: str = "quantitative", **options: Any) -> Spec:
    """Returns the encoding of a field, "quantitative", "ordinal" or "nominal"."""
    return {"field": field, "type": kind, **options}


def dot(size: int, **options: Any) -> Spec:
    """Returns a filled point of so many square pixels."""
    return {"type": "point", "filled": True, "size": size, **options}


def tight(padding: int, **options: Any) -> Spec:
    """Returns a scale that is as long as the values are apart, and a few pixels more."""
    return {**options, "nice": False, "padding": padding}


def tips(points: Sequence[Point]) -> list[dict[str, str]]:
    """Returns the tooltip of points: all that they have under "tip"."""
    names = dict.fromkeys(key for p in points for key in p["tip"])
    return [{"field": _escape_field(name), "title": name} for name in names]


def with_tips(points: Sequence[Point]) -> list[Point]:
    """Returns points whose tips are fields of their own."""
    return [{k: v for k, v in p.items() if k != "tip"} | p["tip"] for p in points]


def _escape_field(name: str) -> str:
    """Returns a key as a field's name, in which dots and brackets would be paths."""
    for char in "\\.[]'\"":
        name = name.replace(char, f"\\{char}")
    return name
