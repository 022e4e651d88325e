"""Accuracy against size on disk: one point an arm, and the front that none of them dominates."""

import dataclasses
import io
import itertools
import math
import os
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kdq.files import write_atomic
from kdq.report import Record, labels
from kdq.report.aggregate import Row, rows

# Okabe and Ito's palette, which the color-blind can tell apart; the kinds of the design are fixed
# so that two reports look alike, others take the spare colours in turn.
COLORS = {
    "teacher": "#000000",
    "student": "#7f7f7f",
    "KD": "#56b4e9",
    "PTQ": "#e69f00",
    "QAT": "#009e73",
    "QAD": "#d55e00",
}
SPARE_COLORS = ("#0072b2", "#cc79a7", "#f0e442")
MARKERS = "osD^vP*Xphd<>"
MARKER_SIZE = 6.0  # points
FONT_SIZE = 6.5  # points
FRONT = {"color": "#999999", "lw": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Point:
    row: Row
    series: str  # arms that differ only in their bits
    x: float  # bytes, moved aside where arms of one size would hide each other
    color: str
    marker: str

    @property
    def y(self) -> float:
        return self.row.accuracy.mean

    @property
    def error(self) -> float:
        return 0.0 if math.isnan(self.row.accuracy.std) else self.row.accuracy.std


def accuracy_vs_size(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Draws mean test accuracy (± std over seeds) against bytes on disk as a PNG, atomically.

    Where some arms collapsed, a second panel shows the others at their own scale.  Arms without a
    finished seed or without a file are not drawn.

    Args:
      records: as for `kdq.report.table.rows`.
      path: of the PNG.
    """
    points = _points([r for r in rows(records) if r.seeds and r.accuracy.n and r.size_bytes > 0])
    floor = zoom_floor([p.y - p.error for p in points])
    figure = Figure(figsize=(10 if floor is not None else 7, 4.6), layout="constrained")
    panels = figure.subplots(1, 1 if floor is None else 2, squeeze=False)[0]
    for i, axes in enumerate(panels):
        zoomed = i == 1
        shown = [p for p in points if p.y >= floor] if zoomed else points
        _draw(axes, shown)
        title = f"the best {len(shown)} of {len(points)}" if zoomed else f"all {len(points)} arms"
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("test accuracy (%), mean ± std over seeds")
    if points:
        figure.legend(
            handles=_legend(points), loc="outside lower center", ncols=5, fontsize=7, frameon=False
        )
    # Constrained layout moves the panels, and labels are placed in absolute lengths.
    figure.draw_without_rendering()
    for i, axes in enumerate(panels):
        inside_zoom = floor is not None and i == 0
        _label(axes, [p for p in points if (p.y < floor if inside_zoom else True)], points)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=200)
    write_atomic(path, picture.getvalue())


def zoom_floor(accuracies: Sequence[float]) -> float | None:
    """The accuracy above which a second panel helps; None where one panel is enough.

    Half of the arms or more, and three at least, then share a quarter of the first panel or less.
    """
    ordered = sorted(accuracies)
    if not ordered or ordered[0] == ordered[-1]:
        return None
    quarter = ordered[-1] - (ordered[-1] - ordered[0]) / 4
    below = sum(a < quarter for a in ordered)
    if below > len(ordered) / 2 or len(ordered) - below < 3:
        return None
    return (ordered[below - 1] + ordered[below]) / 2


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (size, accuracy) points that no smaller or equal one beats, by size."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _points(table: Sequence[Row]) -> list[_Point]:
    kinds = list(dict.fromkeys(row.kind for row in table if row.kind not in COLORS))
    spare = {kind: SPARE_COLORS[i % len(SPARE_COLORS)] for i, kind in enumerate(kinds)}
    series = list(dict.fromkeys(_series(row) for row in table))
    places = side_by_side([row.size_bytes for row in table])
    return [
        _Point(
            row=row,
            series=_series(row),
            x=x,
            color=(COLORS | spare)[row.kind],
            marker=MARKERS[series.index(_series(row)) % len(MARKERS)],
        )
        for row, x in zip(table, places, strict=True)
    ]


def _series(row: Row) -> str:
    """What one method's bit-widths have in common, so that they share a marker."""
    return row.method or row.kind or row.arm


def side_by_side(sizes: Sequence[float]) -> list[float]:
    """Sizes, with those that are equal within 2% spread evenly (in log) around their mean."""
    if not sizes:
        return []
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    groups = [[order[0]]]
    for i in order[1:]:
        if sizes[i] <= sizes[groups[-1][0]] * 1.02:
            groups[-1].append(i)
        else:
            groups.append([i])
    centers = [sum(math.log(sizes[i]) for i in group) / len(group) for group in groups]
    span = max(centers[-1] - centers[0], 1.0)
    gaps = [math.inf, *(b - a for a, b in itertools.pairwise(centers)), math.inf]
    places = [0.0] * len(sizes)
    for g, group in enumerate(groups):
        room = 0.7 * min(gaps[g], gaps[g + 1])
        step = min(0.025 * span, room / len(group))
        for k, i in enumerate(sorted(group)):
            places[i] = math.exp(centers[g] + step * (k - (len(group) - 1) / 2))
    return places


def _draw(axes: Axes, points: Sequence[_Point]) -> None:
    axes.set_xscale("log", base=2)
    for p in points:
        axes.errorbar(
            p.x,
            p.y,
            yerr=p.error,
            color=p.color,
            marker=p.marker,
            markersize=MARKER_SIZE,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=0.8,
            zorder=3,
        )
    front = [points[i] for i in pareto_front([(p.row.size_bytes, p.y) for p in points])]
    # Steps, because nothing between two arms has been shown to exist.
    axes.step([p.x for p in front], [p.y for p in front], "--", where="post", **FRONT, zorder=1)
    axes.margins(x=0.08, y=0.08)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=10))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1024:g}"))
    axes.set_xlabel("size on disk (KiB); arms of equal size stand side by side", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#eeeeee", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(points: Sequence[_Point]) -> list:
    first = {(p.series, p.color): p for p in reversed(points)}
    handles = [
        Line2D(
            [],
            [],
            ls="",
            color=p.color,
            marker=p.marker,
            ms=MARKER_SIZE,
            label=p.series if p.row.kind in ("", p.series) else f"{p.row.kind}: {p.series}",
        )
        for p in reversed(first.values())
    ]
    return [*handles, Line2D([], [], ls="--", **FRONT, label="Pareto front")]


def _label(axes: Axes, labelled: Sequence[_Point], points: Sequence[_Point]) -> None:
    """Writes the bits beside the labelled points; the others are obstacles."""
    low, high = axes.get_ylim()
    visible = [p for p in points if low <= p.y <= high]
    to_points = 72 / axes.figure.dpi
    where = [tuple(axes.transData.transform((p.x, p.y)) * to_points) for p in visible]
    texts = [p.row.bits if p in labelled else "" for p in visible]
    box = axes.get_window_extent()
    bounds = tuple(v * to_points for v in (box.x0, box.y0, box.x1, box.y1))
    points_per_percent = (bounds[3] - bounds[1]) / (high - low)
    errors = [p.error * points_per_percent for p in visible]
    offsets = labels.place(where, errors, texts, bounds, FONT_SIZE, MARKER_SIZE)
    for p, text, offset in zip(visible, texts, offsets, strict=True):
        if text and offset is not None:
            # A line leads to a label that does not touch its marker.
            far = math.hypot(*offset) > 24
            axes.annotate(
                text,
                (p.x, p.y),
                offset,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=FONT_SIZE,
                color=_dark(p.color),
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                zorder=2,
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": p.color} if far else None,
            )


def _dark(color: str) -> tuple[float, float, float]:
    """Small text needs more contrast than a marker does."""
    red, green, blue = to_rgb(color)
    return 0.65 * red, 0.65 * green, 0.65 * blue
