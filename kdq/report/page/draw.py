"""Vega-Lite rendered: its program for the page, and pictures as files."""

import functools
from collections.abc import Sequence
from typing import Any

import vl_convert

from kdq.report.page.specs import Spec

VERSION = "6.4"  # of Vega-Lite
WIDTH = 560  # of a picture, in units of which a PNG has two pixels


@functools.cache
def program() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which loads nothing."""
    return vl_convert.javascript_bundle(vl_version=VERSION).replace("</script", r"<\/script")


def on_page(spec: Spec) -> Spec:
    """As wide as its place, in the colors of the text around it."""
    return {**spec, "width": "container", "config": _config("currentColor")}


def pictures(specs: Sequence[Spec], title: str) -> tuple[bytes, bytes]:
    """(PNG, SVG) of charts side by side, on white."""
    joined: Spec = {
        "$schema": specs[0]["$schema"],
        "title": {"text": title, "anchor": "start"},
        "hconcat": [{"width": WIDTH if len(specs) == 1 else 420, **_bare(s)} for s in specs],
        "config": {**_config("#222222"), "background": "white", "padding": 12},
    }
    svg = vl_convert.vegalite_to_svg(joined, vl_version=VERSION)
    return vl_convert.svg_to_png(svg, scale=2), svg.encode()


def _bare(spec: Spec) -> Spec:
    return {key: value for key, value in spec.items() if key != "$schema"}


def _config(ink: str) -> dict[str, Any]:
    faint = {"gridColor": ink, "gridOpacity": 0.15, "domainColor": ink, "tickColor": ink}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "axis": {
            **faint,
            "labelColor": ink,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "labelFontSize": 11,
            "titleFontSize": 12,
            "domainOpacity": 0.4,
            "tickOpacity": 0.4,
        },
        "legend": {
            "orient": "bottom",
            "labelColor": ink,
            "titleColor": ink,
            "columns": 3,
            "labelLimit": 220,
            "titleFontWeight": "normal",
        },
        "title": {"color": ink, "fontSize": 12, "fontWeight": "normal", "anchor": "start"},
        "text": {"color": ink},
        "view": {"stroke": None},
    }
