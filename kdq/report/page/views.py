"""Data of charts from what was kept of single runs: curves, bins, layers, maps, confusions.

An arm's details are those of its first finished seed, but for counts, which are of all seeds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdq.evaluate.statistics import paired_interval, summary
from kdq.report import metric as metrics
from kdq.report.advisor.study import Study
from kdq.report.aggregate import Latencies, Row, distinct_text
from kdq.report.cells import format_bytes, format_energy, mean_cell
from kdq.report.page import pictures
from kdq.report.page.combine import Experiment
from kdq.report.page.details import BINS, read_curve, read_details

UNKNOWN, FRESH = "not known", "fresh weights"  # of what an arm starts from

Details = Mapping[str, Mapping[int, Mapping[str, Any]]]  # of arms, by the place of their seed


def collect_details(experiment: Experiment, arms: Sequence[str]) -> tuple[Details, list[str]]:
    """Returns what there is of the arms, and what is missing."""
    details: dict[str, dict[int, Mapping[str, Any]]] = {}
    problems = []
    for arm in arms:
        for place, folder in enumerate(experiment.folders_of(arm)):
            document, problem = read_details(folder)
            if document:
                details.setdefault(arm, {})[place] = document
            if problem:
                problems.append(problem)
    return details, problems


def find_starts(study: Study) -> dict[str, str]:
    """Returns what each arm starts from: a float arm's weights, a file, or fresh weights."""
    starts = {}
    for candidate in study.candidates:
        config, fresh = candidate.source.config, UNKNOWN
        if config:
            fresh = "a file" if config["arms"][candidate.arm].get("load") else FRESH
        starts[candidate.arm] = candidate.lineage.start or fresh
    return starts


def arm_points(
    rows: Sequence[Row], starts: Mapping[str, str], times: Latencies | None = None
) -> list[dict[str, Any]]:
    """Returns a point for each arm that finished, for charts of the metric against costs.

    Latencies are keyed "DEVICE, batch".

    Args:
      rows: of the arms.
      starts: what each of them starts from, as far as it is known.
      times: from `kdq.report.aggregate.latencies`.
    """
    points = []
    for row in (row for row in rows if row.seeds):
        low, high = _interval(row)
        nearness = next(iter(metrics.fidelity_metrics(row.task)), None)
        start = starts.get(row.arm, UNKNOWN)
        timed = {c: arms[row.arm] for c, arms in (times or {}).items() if row.arm in arms}
        points.append(
            {
                "arm": row.arm,
                "kind": row.kind or "other",
                "bits": row.bits,
                "start": start,
                "score": _finite(row.score.mean),
                "low": low,
                "high": high,
                "fidelity": _finite(row.mean_of(nearness).mean) if nearness else None,
                "size": _finite(row.size_bytes / 1024),
                "energy": _finite(row.energy_modelled_nj),
                **{str(c): mean.mean for c, (mean, _) in timed.items()},
                "tip": _tip(row, start, low, high),
            }
        )
    return points


def _interval(row: Row) -> tuple[float | None, float | None]:
    """Returns 95% of the mean over seeds, as the metric is shown."""
    values = {seed: row.metric.shown(v) for seed, v in row.values(row.metric.name).items()}
    if len(values) < 2:
        return None, None
    interval = paired_interval(values, dict.fromkeys(values, 0.0))
    return interval.low, interval.high


def _tip(row: Row, start: str, low: float | None, high: float | None) -> dict[str, str]:
    """Returns the record of an arm in a few words."""
    metric = row.metric
    digits = metric.decimals
    return {
        "Arm": row.arm,
        "Kind, bits": f"{row.kind}, {row.bits}",
        "Starts from": start,
        metrics.named(metric, first=True): f"{mean_cell(row.score, digits)} {metric.unit}".rstrip(),
        "95% interval": "one seed" if low is None else f"{low:.{digits}f} to {high:.{digits}f}",
        "Size": format_bytes(row.size_bytes),
        "Energy": f"{format_energy(row.energy_modelled_nj)}, modelled",
        "Seeds": ", ".join(map(str, row.seeds)),
        "Config digest": distinct_text(row.finished, "config_digest"),
        "Commit": distinct_text(row.finished, "commit")[:24],
        "Device": distinct_text(row.finished, "device"),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def training_curves(experiment: Experiment, most: int = 3000) -> tuple[list[dict], list[dict]]:
    """Returns (metric on validation of all seeds, loss of the first seed in windows) by step."""
    metric, trained = experiment.metric, [r for r in experiment.rows if r.seeds]
    windows = max(10, min(60, most // max(1, len(trained))))
    validation, losses = [], []
    for row in trained:
        arm = {"arm": row.arm, "kind": row.kind}
        by_step: dict[int, list[float]] = {}
        for place, folder in enumerate(experiment.folders_of(row.arm)):
            entries = read_curve(folder, every=place == 0)
            for entry in entries:
                if (value := entry.get(f"validation_{metric.name}")) is not None:
                    by_step.setdefault(entry["step"], []).append(metric.shown(value))
            if place == 0:
                losses += [arm | window for window in _windows(entries, windows)]
        validation += [
            {**arm, "step": step, "score": summary(values)[0]}
            for step, values in sorted(by_step.items())
        ]
    return validation, losses


def _windows(entries: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, float]]:
    """Returns means over equal parts of the training, so that a line can be seen."""
    entries = [entry for entry in entries if "loss" in entry]
    parts = np.array_split(np.arange(len(entries)), min(count, len(entries)) or 1)
    return [
        {
            "step": entries[part[-1]]["step"],
            "loss": float(f"{np.mean([entries[i]['loss'] for i in part]):.4g}"),
        }
        for part in parts
        if len(part)
    ]


def reliability_bins(details: Details) -> list[dict[str, Any]]:
    """Returns bins of all seeds, each weighted by its examples."""
    result = []
    for arm, seeds in details.items():
        bins: dict[int, list[tuple[float, float, int]]] = {}
        for document in seeds.values():
            parts = document.get("reliability") or {}
            entries = zip(*(parts.get(k, ()) for k in BINS), strict=True)
            for place, (confidence, accuracy, count) in enumerate(entries):
                if count and None not in (confidence, accuracy):
                    bins.setdefault(place, []).append((confidence, accuracy, count))
        for _, entries in sorted(bins.items()):
            values = np.asarray(entries)
            weights = values[:, 2]
            result.append(
                {
                    "arm": arm,
                    "confidence": float(np.average(values[:, 0], weights=weights)),
                    "accuracy": float(np.average(values[:, 1], weights=weights)),
                    "count": int(weights.sum()),
                }
            )
    return result


def confusion_cells(details: Details, arm: str, teacher: str) -> list[dict[str, Any]]:
    """Returns the mean count of each class and predicted class, less the teacher's."""
    ours, theirs = (_confusion(details.get(name, {})) for name in (arm, teacher))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return []
    return [
        {"class": i, "predicted": j, "difference": float(value)}
        for (i, j), value in np.ndenumerate(np.round(ours - theirs, 2))
    ]


def _confusion(seeds: Mapping[int, Mapping[str, Any]]) -> np.ndarray | None:
    counts = [document["confusion"] for document in seeds.values() if document.get("confusion")]
    return np.mean(np.asarray(counts, np.float64), axis=0) if counts else None


def layers_of_arms(details: Details, arms: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the rows of `kdq.experiment.details` of the first seed of quantized arms."""
    result = {}
    for arm in arms:
        layers = next(iter(details.get(arm, {}).values()), {}).get("layers") or []
        if any(row["weight_bits"] < 32 or row["input_bits"] < 32 for row in layers):
            result[arm] = layers
    return result


def width_name(row: Mapping[str, Any]) -> str:
    """Returns W4A8 of a layer; fp32 of what stays in float."""
    name = "".join(
        f"{letter}{row[key]}"
        for letter, key in (("W", "weight_bits"), ("A", "input_bits"))
        if row[key] < 32
    )
    return name or "fp32"


def attribution_maps(details: Details) -> list[dict[str, Any]]:
    """Returns [{"arm": ..., "maps": [{"uri": data URI, "says": text}]}], the images first."""
    rows: list[dict[str, Any]] = []
    for arm, seeds in details.items():
        document = next(iter(seeds.values()), {}).get("attributions") or {}
        if not document.get("maps"):
            continue
        if not rows:
            pairs = zip(document["images"], document["label"], strict=True)
            shown = [{"uri": pictures.gray(i), "says": f"class {label}"} for i, label in pairs]
            rows.append({"arm": "image", "maps": shown})
        maps = [
            {"uri": pictures.signed(values), "says": f"says {label}, {100 * (p or 0):.0f}%"}
            for values, label, p in zip(
                document["maps"], document["predicted"], document["probability"], strict=True
            )
        ]
        rows.append({"arm": arm, "maps": maps})
    return rows
