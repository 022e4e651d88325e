"""Details and curves of a run, of which only what a chart can hold is used."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from kdq.fields import ConfigError
from kdq.report.workdirs import read_json

LARGEST = 2**63 - 1  # integers of charts
LARGEST_FLOAT = float(np.finfo(np.float32).max)  # of what charts show

# What `kdq.experiment.details` writes.
BINS = ("confidence", "accuracy", "count")
EXAMPLES = ("images", "maps", "label", "predicted", "probability")
LAYER = (
    *("path", "kind", "weight_bits", "input_bits", "weights", "bytes", "macs", "bops"),
    *("energy_modelled_nj", "sqnr_db", "range", "sensitivity"),
)


def read_details(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns what `kdq.experiment.details` left of a run, and why there is nothing, or ""."""
    path = folder / "details.json"
    if not path.is_file():
        return {}, f"{path} is not there: it is from before details were kept"
    try:
        document = read_json(path)
    except ConfigError as error:
        return {}, str(error)
    try:
        _check_details(document)
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
