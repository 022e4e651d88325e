"""Data of charts from what was kept of single runs: curves, bins, layers, maps, confusions.

An arm's details are those of its first finished seed, but for counts, which are of all seeds. Only
what a chart can hold is used.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdq.evaluate.statistics import paired_interval, summary
from kdq.fields import ConfigError
from kdq.report import metric as metrics
from kdq.report.advisor.study import Study
from kdq.report.aggregate import Latencies, Row, distinct_text
from kdq.report.cells import format_bytes, format_energy, mean_cell
from kdq.report.page.combine import Experiment
from kdq.report.workdirs import read_json

UNKNOWN, FRESH = "not known", "fresh weights"  # of what an arm starts from
LARGEST = 2**63 - 1  # integers of charts
LARGEST_FLOAT = float(np.finfo(np.float32).max)  # of what charts show
NEGATIVE, ZERO, POSITIVE = ((59, 120, 194), (245, 245, 245), (201, 84, 44))  # of maps
# What `kdq.experiment.details` writes.
BINS = ("confidence", "accuracy", "count")
EXAMPLES = ("images", "maps", "label", "predicted", "probability")
LAYER = (
    *("path", "kind", "weight_bits", "input_bits", "weights", "bytes", "macs", "bops"),
    *("energy_modelled_nj", "sqnr_db", "range", "sensitivity"),
)

Details = Mapping[str, Mapping[int, Mapping[str, Any]]]  # of arms, by the place of their seed


def read_details(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns what `kdq.experiment.details` left of a run, and why there is nothing, or ""."""
    path = folder / "details.json"
    if not path.is_file():
        return {}, f"{path} is not there: it is from before details were kept"
    try:
        document = read_json(path)
        _check_details(document)
    except ConfigError as error:
        return {}, str(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return {}, f"{path} is no file of details: {error!r}"
    return document, ""


def _check_details(document: Any) -> None:
    """Raises whatever comes first where something is missing, or of another type or shape."""
    counts = document.get("confusion")  # of classification alone
    if counts is not None and _array(counts).shape != (len(counts), len(counts)):
        raise ValueError("a confusion matrix that is not square")
    for part, keys in (("reliability", BINS), ("attributions", EXAMPLES)):
        if document.get(part) is not None:
            arrays = [_array(document[part][key], missing=part == "reliability") for key in keys]
            if len({array.shape[0] for array in arrays}) != 1:
                raise ValueError(f"lists of different lengths in {part}")
    for row in document["layers"]:
        if missing := [key for key in LAYER if key not in row]:
            raise ValueError(f"a layer without {', '.join(missing)}")
        if not (isinstance(row["path"], str) and isinstance(row["kind"], str)):
            raise ValueError("a layer whose path or kind is no text")
        for key in LAYER[2:]:
            shape = _array(row[key], missing=True).shape
            if shape != () and (key, shape) != ("range", (2,)):
                raise ValueError(f"a layer whose {key} has the shape {shape}")


def _array(value: Any, *, missing: bool = False) -> np.ndarray:
    """Returns a number, or nested lists of numbers, as floats; None as NaN if it may be `missing`.

    Raises ValueError for anything else, and for lists of unequal lengths.
    """

    def number(entry: Any) -> Any:
        if isinstance(entry, list):
            return [number(inner) for inner in entry]
        if entry is None and missing:
            return math.nan
        if not _is_charted(entry):
            raise ValueError(f"{entry!r:.40} where a number is expected")
        return entry

    return np.asarray(number(value), np.float64)


def _is_charted(value: Any) -> bool:
    """Returns whether a value is a number that a chart can hold."""
    most = LARGEST if type(value) is int else LARGEST_FLOAT
    return type(value) in (int, float) and abs(value) <= most


def read_curve(folder: Path, *, every: bool = True) -> list[dict[str, Any]]:
    """Returns the entries of `metrics.jsonl` that can be read; a line that was cut off is none.

    Args:
      folder: of an arm and seed.
      every: all of them, or those of validation alone.
    """
    path, entries = folder / "metrics.jsonl", []
    if not path.is_file():  # a device or a pipe would be read without end
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        if not (every or "validation" in line):
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and _is_charted(entry.get("step")):
            entries.append({key: value for key, value in entry.items() if _is_charted(value)})
    return entries


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

    Args:
      rows: of the arms.
      starts: what each of them starts from, as far as it is known.
      times: from `kdq.report.aggregate.latencies`; a point has them by their condition's text.
    """
    finite = lambda value: value if math.isfinite(value) else None
    points = []
    for row in (row for row in rows if row.seeds):
        metric, digits = row.metric, row.metric.decimals
        # 95% of the mean over seeds, as the metric is shown.
        values = {seed: metric.shown(v) for seed, v in row.values(metric.name).items()}
        low = high = None
        if len(values) > 1:
            interval = paired_interval(values, dict.fromkeys(values, 0.0))
            low, high = interval.low, interval.high
        ends = "one seed" if low is None else f"{low:.{digits}f} to {high:.{digits}f}"
        nearness = next(iter(metrics.fidelity_metrics(row.task)), None)
        start = starts.get(row.arm, UNKNOWN)
        timed = {c: arms[row.arm] for c, arms in (times or {}).items() if row.arm in arms}
        points.append(
            {
                "arm": row.arm,
                "kind": row.kind or "other",
                "bits": row.bits,
                "start": start,
                "score": finite(row.score.mean),
                "low": low,
                "high": high,
                "fidelity": finite(row.mean_of(nearness).mean) if nearness else None,
                "size": finite(row.size_bytes / 1024),
                "energy": finite(row.energy_modelled_nj),
                **{str(c): mean.mean for c, (mean, _) in timed.items()},
                "tip": {
                    "Arm": row.arm,
                    "Kind, bits": f"{row.kind}, {row.bits}",
                    "Starts from": start,
                    metrics.named(metric, first=True): (
                        f"{mean_cell(row.score, digits)} {metric.unit}".rstrip()
                    ),
                    "95% interval": ends,
                    "Size": format_bytes(row.size_bytes),
                    "Energy": f"{format_energy(row.energy_modelled_nj)}, modelled",
                    "Seeds": ", ".join(map(str, row.seeds)),
                    "Config digest": distinct_text(row.finished, "config_digest"),
                    "Commit": distinct_text(row.finished, "commit")[:24],
                    "Device": distinct_text(row.finished, "device"),
                },
            }
        )
    return points


def training_curves(experiment: Experiment, most: int = 3000) -> tuple[list[dict], list[dict]]:
    """Returns (metric on validation of all seeds, loss of the first seed) by step.

    Losses are means over equal parts of the training, so that a line can be seen.
    """
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
            lossy = [entry for entry in entries if "loss" in entry] if place == 0 else []
            for part in np.array_split(np.arange(len(lossy)), min(windows, len(lossy)) or 1):
                if len(part):
                    loss = float(f"{np.mean([lossy[i]['loss'] for i in part]):.4g}")
                    losses.append({**arm, "step": lossy[part[-1]]["step"], "loss": loss})
        validation += [
            {**arm, "step": step, "score": summary(values)[0]}
            for step, values in sorted(by_step.items())
        ]
    return validation, losses


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
            confidences, accuracies, counts = np.asarray(entries).T
            means = [float(np.average(v, weights=counts)) for v in (confidences, accuracies)]
            values = zip(BINS, (*means, int(counts.sum())), strict=True)
            result.append({"arm": arm, **dict(values)})
    return result


def confusion_cells(details: Details, arm: str, teacher: str) -> list[dict[str, Any]]:
    """Returns the mean count of each class and predicted class, less the teacher's."""
    means = []
    for seeds in (details.get(arm, {}), details.get(teacher, {})):
        counts = [document["confusion"] for document in seeds.values() if document.get("confusion")]
        means += [np.mean(np.asarray(counts, np.float64), axis=0)] if counts else []
    if len(means) < 2 or means[0].shape != means[1].shape:
        return []
    return [
        {"class": i, "predicted": j, "difference": float(value)}
        for (i, j), value in np.ndenumerate(np.round(means[0] - means[1], 2))
    ]


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
    widths = {"W": row["weight_bits"], "A": row["input_bits"]}
    return "".join(f"{letter}{bits}" for letter, bits in widths.items() if bits < 32) or "fp32"


def attribution_maps(details: Details) -> list[dict[str, Any]]:
    """Returns [{"arm": ..., "maps": [{"uri": data URI, "says": text}]}], the images first."""
    rows: list[dict[str, Any]] = []
    for arm, seeds in details.items():
        document = next(iter(seeds.values()), {}).get("attributions") or {}
        if not document.get("maps"):
            continue
        if not rows:
            pairs = zip(document["images"], document["label"], strict=True)
            shown = [{"uri": _draw_image(i), "says": f"class {label}"} for i, label in pairs]
            rows.append({"arm": "image", "maps": shown})
        examples = zip(*(document[k] for k in ("maps", "predicted", "probability")), strict=True)
        maps = [
            {"uri": _draw_map(values), "says": f"says {label}, {100 * (p or 0):.0f}%"}
            for values, label, p in examples
        ]
        rows.append({"arm": arm, "maps": maps})
    return rows


def _draw_image(image: Sequence[Sequence[float]]) -> str:
    """Returns a gray image, from its darkest to its brightest pixel."""
    values = np.asarray(image, np.float64)
    span = np.ptp(values) or 1.0
    return _encode_png(np.repeat(255 * ((values - values.min()) / span)[..., None], 3, -1))


def _draw_map(values: Sequence[Sequence[float]]) -> str:
    """Returns a map: red speaks for the class, blue against it, to its own largest value."""
    array = np.asarray(values, np.float64)
    share = (array / (np.abs(array).max() or 1.0))[..., None]
    ends = np.where(share > 0, np.asarray(POSITIVE), np.asarray(NEGATIVE))
    return _encode_png(np.asarray(ZERO) * (1 - np.abs(share)) + ends * np.abs(share))


def _encode_png(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(np.round(pixels).astype(np.uint8)).save(out, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
