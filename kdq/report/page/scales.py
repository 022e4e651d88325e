"""Colors and shapes of kinds and arms: the same in every chart."""

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
SHAPES = {
    "teacher": "diamond",
    "labels": "circle",
    "KD": "square",
    "PTQ": "triangle-up",
    "QAT": "triangle-down",
    "QAD": "cross",
}
SPARE_SHAPES = ("triangle-right", "triangle-left", "stroke")


def _kind_scale(kinds: Sequence[str]) -> dict[str, Any]:
    """Color of each kind: the same in every chart of every report."""
    known = [kind for kind in COLORS if kind in kinds]
    other = sorted({kind for kind in kinds if kind not in COLORS})
    spare = [SPARE_COLORS[i % len(SPARE_COLORS)] for i in range(len(other))]
    return {"domain": [*known, *other], "range": [*(COLORS[k] for k in known), *spare]}


def of_arms(arms: Sequence[str]) -> dict[str, Any]:
    """Color of each arm, for the few that a chart shows."""
    colors = [*COLORS.values(), *SPARE_COLORS]
    return {
        "field": "arm",
        "type": "nominal",
        "title": None,
        "legend": {"columns": 2, "labelLimit": 150},
        "scale": {
            "domain": list(arms),
            "range": [colors[i % len(colors)] for i in range(len(arms))],
        },
    }


def of_kinds(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Color and shape of the "kind" of each point."""
    scale = _kind_scale([p["kind"] for p in points])
    other = [kind for kind in scale["domain"] if kind not in SHAPES]
    spare = [SPARE_SHAPES[i % len(SPARE_SHAPES)] for i in range(len(other))]
    shapes = [*(SHAPES[k] for k in scale["domain"] if k in SHAPES), *spare]
    return {
        "color": {"field": "kind", "type": "nominal", "scale": scale, "title": None},
        "shape": {
            "field": "kind",
            "type": "nominal",
            "scale": {"domain": scale["domain"], "range": shapes},
            "title": None,
        },
    }
