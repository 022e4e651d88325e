"""What was kept of single runs, as the data of charts: curves, bins, layers, maps, confusions.

An arm's details are those of its first finished seed, but for counts, which are of all seeds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdq.evaluate.statistics import paired_interval, summary
from kdq.report.advisor.evidence import Study
from kdq.report.aggregate import Row, number
from kdq.report.cells import format_bytes, format_energy, mean_cell
from kdq.report.page import pictures, read
from kdq.report.page.combine import Experiment
from kdq.report.page.times import latencies

UNKNOWN, FRESH = "not known", "fresh weights"  # of what an arm starts from

Details = Mapping[str, Mapping[int, Mapping[str, Any]]]  # of arms, by the place of their seed


def details(experiment: Experiment, arms: Sequence[str]) -> tuple[Details, list[str]]:
    """What there is of the arms, and what is missing."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    problems = []
    for arm in arms:
        for place, folder in enumerate(experiment.folders_of(arm)):
            own, problem = read.details(folder)
            if own:
                found.setdefault(arm, {})[place] = own
            if problem:
                problems.append(problem)
    return found, problems


def starts(study: Study) -> dict[str, str]:
    """Returns what each arm starts from: a float arm's weights, a file, or fresh weights."""
    found = {}
    for candidate in study.candidates:
        config = candidate.source.config
        fresh = UNKNOWN
        if config:
            fresh = "a file" if config["arms"][candidate.arm].get("load") else FRESH
        found[candidate.arm] = candidate.lineage.start or fresh
    return found


def points(experiment: Experiment, starts: Mapping[str, str]) -> list[dict[str, Any]]:
    """One an arm, for charts of accuracy against costs; latencies are keyed "DEVICE, batch".

    Args:
      experiment: has the arms.
      starts: what each of them starts from, as far as it is known.
    """
    times = latencies(experiment.records)
    found = []
    for row in experiment.rows:
        if not row.seeds:
            continue
        low, high = _interval(experiment, row)
        own = {c: entries[row.arm] for c, entries in times.items() if row.arm in entries}
        found.append(
            {
                "arm": row.arm,
                "kind": row.kind or "other",
                "bits": row.bits,
                "start": starts.get(row.arm, UNKNOWN),
                "accuracy": _finite(row.accuracy.mean),
                "low": low,
                "high": high,
                "agreement": _finite(row.agreement.mean),
                "size": _finite(row.size_bytes / 1024),
                "energy": _finite(row.energy_modelled_nj),
                **{str(c): entry[0].mean for c, entry in own.items()},
                "tip": _tip(experiment, row, starts.get(row.arm, UNKNOWN), low, high),
            }
        )
    return found


def _interval(experiment: Experiment, row: Row) -> tuple[float | None, float | None]:
    """95% of the mean accuracy over seeds."""
    own = [r for r in experiment.records if r["arm"] == row.arm and r["status"] == "ok"]
    values = {r["seed"]: 100 * number(r, "accuracy") for r in own}
    values = {seed: v for seed, v in values.items() if not math.isnan(v)}
    if len(values) < 2:
        return None, None
    found = paired_interval(values, dict.fromkeys(values, 0.0))
    return found.low, found.high


def _tip(
    experiment: Experiment, row: Row, start: str, low: float | None, high: float | None
) -> dict[str, str]:
    """The record of an arm in a few words."""
    own = [r for r in experiment.records if r["arm"] == row.arm and r["status"] == "ok"]
    distinct = lambda key: " and ".join(dict.fromkeys(str(r[key]) for r in own if r.get(key)))
    return {
        "Arm": row.arm,
        "Kind, bits": f"{row.kind}, {row.bits}",
        "Starts from": start,
        "Accuracy": mean_cell(row.accuracy) + " %",
        "95% interval": "one seed" if low is None else f"{low:.2f} to {high:.2f}",
        "Size": format_bytes(row.size_bytes),
        "Energy": f"{format_energy(row.energy_modelled_nj)}, modelled",
        "Seeds": ", ".join(map(str, row.seeds)),
        "Config digest": distinct("config_digest") or "not recorded",
        "Commit": distinct("commit")[:24] or "not recorded",
        "Device": distinct("device") or "not recorded",
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def training(experiment: Experiment, most: int = 3000) -> tuple[list[dict], list[dict]]:
    """(validation accuracy of all seeds, loss of the first seed in windows) by step."""
    trained = [r for r in experiment.rows if r.seeds]
    windows = max(10, min(60, most // max(1, len(trained))))
    validation, losses = [], []
    for row in trained:
        own: dict[int, list[float]] = {}
        for place, folder in enumerate(experiment.folders_of(row.arm)):
            entries = read.curve(folder, every=place == 0)
            for entry in entries:
                if isinstance(value := entry.get("validation_accuracy"), int | float):
                    own.setdefault(entry["step"], []).append(100 * value)
            if place == 0:
                losses += [
                    {"arm": row.arm, "kind": row.kind, **w} for w in _windows(entries, windows)
                ]
        validation += [
            {"arm": row.arm, "kind": row.kind, "step": step, "accuracy": summary(values)[0]}
            for step, values in sorted(own.items())
        ]
    return validation, losses


def _windows(entries: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, float]]:
    """Means over equal parts of the training, so that a line can be seen."""
    found = [e for e in entries if isinstance(e.get("loss"), int | float)]
    found = [e for e in found if math.isfinite(e["loss"])]
    parts = np.array_split(np.arange(len(found)), min(count, len(found)) or 1)
    return [
        {
            "step": found[part[-1]]["step"],
            "loss": float(f"{np.mean([found[i]['loss'] for i in part]):.4g}"),
        }
        for part in parts
        if len(part)
    ]


def reliability(details: Details) -> list[dict[str, Any]]:
    """Bins of all seeds, each weighted by its examples."""
    found = []
    for arm, seeds in details.items():
        bins: dict[int, list[tuple[float, float, int]]] = {}
        for own in seeds.values():
            parts = own.get("reliability") or {}
            columns = [parts.get(k, ()) for k in read.BINS]
            entries = zip(*columns, strict=True)
            for place, (confidence, accuracy, count) in enumerate(entries):
                if count and None not in (confidence, accuracy):
                    bins.setdefault(place, []).append((confidence, accuracy, count))
        for _, entries in sorted(bins.items()):
            values = np.asarray(entries)
            weights = values[:, 2]
            found.append(
                {
                    "arm": arm,
                    "confidence": float(np.average(values[:, 0], weights=weights)),
                    "accuracy": float(np.average(values[:, 1], weights=weights)),
                    "count": int(weights.sum()),
                }
            )
    return found


def confusion_difference(details: Details, arm: str, teacher: str) -> list[dict[str, Any]]:
    """Mean count of each class and predicted class, less the teacher's."""
    ours, theirs = (_confusion(details.get(name, {})) for name in (arm, teacher))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return []
    return [
        {"class": i, "predicted": j, "difference": float(value)}
        for (i, j), value in np.ndenumerate(np.round(ours - theirs, 2))
    ]


def _confusion(seeds: Mapping[int, Mapping[str, Any]]) -> np.ndarray | None:
    found = [own["confusion"] for own in seeds.values() if own.get("confusion")]
    return np.mean(np.asarray(found, np.float64), axis=0) if found else None


def layers(details: Details, arms: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of `kdq.experiment.details` of the first seed of quantized arms."""
    found = {}
    for arm in arms:
        own = next(iter(details.get(arm, {}).values()), {}).get("layers") or []
        if any(row["weight_bits"] < 32 or row["input_bits"] < 32 for row in own):
            found[arm] = own
    return found


def width_name(row: Mapping[str, Any]) -> str:
    """W4A8 of a layer; fp32 of what stays in float."""
    name = "".join(
        f"{letter}{row[key]}"
        for letter, key in (("W", "weight_bits"), ("A", "input_bits"))
        if row[key] < 32
    )
    return name or "fp32"


def attributions(details: Details) -> list[dict[str, Any]]:
    """[{"arm": ..., "maps": [{"image" or "map": data URI, "says": text}]}], the images first."""
    found: list[dict[str, Any]] = []
    for arm, seeds in details.items():
        own = next(iter(seeds.values()), {}).get("attributions") or {}
        if not own.get("maps"):
            continue
        if not found:
            seen = zip(own["images"], own["label"], strict=True)
            shown = [{"uri": pictures.gray(i), "says": f"class {label}"} for i, label in seen]
            found.append({"arm": "image", "maps": shown})
        maps = [
            {"uri": pictures.signed(values), "says": f"says {said}, {100 * (p or 0):.0f}%"}
            for values, said, p in zip(
                own["maps"], own["predicted"], own["probability"], strict=True
            )
        ]
        found.append({"arm": arm, "maps": maps})
    return found
