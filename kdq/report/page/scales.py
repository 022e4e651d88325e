"""Colors, shapes and dashes of kinds, starts and arms: the same in every chart."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

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


def _kind_scale(kinds: Sequence[str]) -> dict[str, Any]:
    """Returns the color of each kind: the same in every chart of every report."""
    known = [kind for kind in COLORS if kind in kinds]
    other = sorted({kind for kind in kinds if kind not in COLORS})
    spare = [SPARE_COLORS[i % len(SPARE_COLORS)] for i in range(len(other))]
    return {"domain": [*known, *other], "range": [*(COLORS[k] for k in known), *spare]}


def arm_colors(arms: Sequence[str]) -> dict[str, Any]:
    """Returns the color of each arm, for the few that a chart shows."""
    colors = [*COLORS.values(), *SPARE_COLORS]
    return {
        "field": "arm",
        "type": "nominal",
        "title": None,
        "legend": {"columns": 2, "labelLimit": LABEL},
        "scale": {
            "domain": list(arms),
            "range": [colors[i % len(colors)] for i in range(len(arms))],
        },
    }


def kind_colors(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the color of the "kind" of each point."""
    scale = _kind_scale([p["kind"] for p in points])
    return {"field": "kind", "type": "nominal", "scale": scale, "title": "kind"}


def start_shapes(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns shapes of what arms start from; those beyond the shapes share the last one."""
    starts = list(dict.fromkeys(p["start"] for p in points))
    shapes = [SHAPES[min(i, len(SHAPES) - 1)] for i in range(len(starts))]
    shape = {"field": "start", "type": "nominal", "title": "starts from"}
    shape["scale"] = {"domain": starts, "range": shapes}
    shape["legend"] = {"symbolFillColor": GRAY, "symbolStrokeColor": GRAY} if starts[1:] else None
    return {"shape": shape}


def curve_styles(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns colors and dashes of arms: a shade of its kind's color, and dashes of its own.

    Of more arms than a legend can name, the color of the kind alone.
    """
    kinds = {p["arm"]: p["kind"] for p in points}
    if len(kinds) > MOST_CURVES:
        return {"color": kind_colors(points)}
    scale = _kind_scale(list(kinds.values()))
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
    return {
        "color": {**shared, "scale": {"domain": arms, "range": colors}},
        "strokeDash": {**shared, "scale": {"domain": arms, "range": dashes}},
    }


def _shade(color: str, place: int, count: int) -> str:
    """Returns a color made darker for the first of so many places, lighter for the last."""
    if count == 1:
        return color
    share = SHADES * (2 * place / (count - 1) - 1)
    end = 255 if share > 0 else 0
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + abs(share) * (end - c)):02x}" for c in parts)


def names_axis(names: Sequence[str]) -> dict[str, Any]:
    """Returns an axis whose long names are broken in two at a separator near their middle."""
    broken = {name: [first, name[len(first) :]] for name in names if (first := _half(name))}
    if not broken:
        return {"labelLimit": LABEL}
    known = f"({json.dumps(broken, ensure_ascii=True)})[datum.value]"
    # Of two lines the upper one would be where the only one is.
    raised = {"condition": {"test": f"isArray({known})", "value": -6}, "value": 0}
    return {
        "labelLimit": LABEL,
        "labelExpr": f"{known} || datum.value",
        "labelOffset": raised,
    }


def _half(name: str) -> str:
    """Returns the first half of a long name; "" of a short one or one without separator."""
    if len(name) <= LONG:
        return ""
    ends = [i + 1 for i, char in enumerate(name[:-1]) if char in "_-/."]
    return name[: min(ends, key=lambda end: abs(2 * end - len(name)))] if ends else ""
