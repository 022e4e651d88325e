"""Vega-Lite rendered: its program for the page, and pictures for files and notebooks."""

import dataclasses
import functools
import io
from collections.abc import Sequence

import vl_convert
from PIL import Image

from kdq.report.page.specs import SCHEMA, Spec, fill
from kdq.report.page.tradeoff import NARROW_LABELS, WIDE

VERSION = "6.4"  # of Vega-Lite
WIDTH = 560  # of a picture, in units of which a PNG has two pixels


@functools.cache
def program() -> str:
    """Returns Vega, Vega-Lite and vega-embed as one script, which loads nothing."""
    return vl_convert.javascript_bundle(vl_version=VERSION).replace("</script", r"<\/script")


def on_page(spec: Spec, legend: bool = True) -> Spec:
    """Returns a chart as wide as its place, in the colors of the text around it."""
    if not legend:
        encoding = spec["encoding"]
        spec = {**spec, "encoding": {**encoding, "color": {**encoding["color"], "legend": None}}}
    return {**spec, "width": "container", "config": fill("theme", ink="currentColor")}


def pictures(specs: Sequence[Spec], title: str, columns: int = 0) -> tuple[bytes, bytes]:
    """Returns (PNG, SVG) of charts on white, side by side or in so many columns."""
    config = {**fill("theme", ink="#222222"), "background": "white", "padding": 12}
    joined: Spec = {"$schema": SCHEMA, "config": config}
    if len(specs) == 1:
        joined |= {"width": WIDTH, **_bare(specs[0])}
        subtitle = joined.pop("title", None)
    else:
        joined["concat" if columns else "hconcat"] = [{"width": WIDE, **_bare(s)} for s in specs]
        joined |= {"columns": columns} if columns else {}
        subtitle = None
    joined["title"] = {"text": title, "anchor": "start"}
    if subtitle:
        joined["title"] |= {"subtitle": subtitle, "subtitleColor": "#222222"}
    svg = vl_convert.vegalite_to_svg(joined, vl_version=VERSION)
    return vl_convert.svg_to_png(svg, scale=2), svg.encode()


@dataclasses.dataclass(frozen=True)
class Picture:
    """Charts in columns, as a notebook shows them."""

    specs: Sequence[Spec]
    title: str = ""
    columns: int = 4

    def _repr_png_(self) -> bytes:
        png = pictures(self.specs, self.title, self.columns)[0]
        # A chart has few colors: with a palette a notebook is a tenth as large.
        few, file = Image.open(io.BytesIO(png)).convert("RGB").quantize(128), io.BytesIO()
        few.save(file, "PNG", optimize=True)
        return file.getvalue()

    def __repr__(self) -> str:
        return f"Picture of {len(self.specs)} charts"


def _bare(spec: Spec) -> Spec:
    """Returns a chart without what stands once in a picture, and what is for phones."""
    bare = {key: value for key, value in spec.items() if key != "$schema"}
    if "layer" in bare:
        layers = [layer for layer in bare["layer"] if layer.get("name") != NARROW_LABELS]
        # Two charts of a picture may not have parts of one name.
        bare["layer"] = [{k: v for k, v in layer.items() if k != "name"} for layer in layers]
    return bare
