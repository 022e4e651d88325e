"""What figures of notebooks share: a style, paired intervals, arms on a plane with their front."""

import math
from collections.abc import Callable, Mapping, Sequence

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, NullLocator
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error.name} is not installed, which figures need: pip install 'kdq[notebooks]'"
    ) from error

from kdq.evaluate.statistics import PairedInterval
from kdq.report.aggregate import Row
from kdq.report.front import pareto_front, side_by_side
from kdq.report.page.scales import COLORS, SPARE_COLORS

FRONT = {"color": "#999999", "lw": 1}

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(
        color=(*SPARE_COLORS[:2], *(COLORS[kind] for kind in ("PTQ", "QAT", "KD", "QAD")))
    ),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 9,
    "grid.color": "#eeeeee",
    "image.cmap": "cividis",
    "legend.frameon": False,
}


def use_style() -> None:
    """Makes the figures that follow look alike, in colours that the color-blind can tell apart."""
    matplotlib.rcParams.update(STYLE)


def draw_intervals(
    axes: Axes, intervals: Mapping[str, PairedInterval], *, color: str = "black"
) -> None:
    """A line each, the first on top: a filled dot where the interval excludes 0, else a hollow one.

    Args:
      axes: to draw in.
      intervals: by what to call them.
      color: of all of them.
    """
    axes.axvline(0, color="#999999", lw=1, zorder=1)
    for place, one in enumerate(intervals.values()):
        filled = color if one.excludes_zero else "white"
        if not math.isnan(one.low):
            axes.plot([one.low, one.high], [place, place], color=color, lw=1.5, zorder=2)
        axes.plot(one.mean, place, "o", ms=6, color=color, mfc=filled, zorder=3)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def draw_front(axes: Axes, rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """Accuracy against a cost, a point each arm by kind; returns the arms of the Pareto front.

    Arms of equal cost stand side by side.

    Args:
      axes: to draw in; its x axis becomes logarithmic.
      rows: with an accuracy each.
      cost: of a row, less being better.
    """
    spare = iter(SPARE_COLORS)
    kinds = dict.fromkeys(row.kind for row in rows)
    places = side_by_side([cost(row) for row in rows])
    axes.set_xscale("log", base=2)
    for kind in kinds:
        own = [i for i, row in enumerate(rows) if row.kind == kind]
        std = [rows[i].accuracy.std for i in own]
        axes.errorbar(
            [places[i] for i in own],
            [rows[i].accuracy.mean for i in own],
            yerr=[0.0 if math.isnan(value) else value for value in std],
            fmt="o",
            color=COLORS.get(kind) or next(spare),
            markeredgecolor="white",
            elinewidth=1,
            label=kind,
            zorder=3,
        )
    front = pareto_front([(cost(row), row.accuracy.mean) for row in rows])
    # Steps, because nothing between two arms has been shown to exist.
    means = [rows[i].accuracy.mean for i in front]
    axes.step([places[i] for i in front], means, "--", where="post", **FRONT, zorder=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    return [rows[i] for i in front]
