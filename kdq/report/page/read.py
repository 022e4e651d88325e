"""Workdirs as they are: what can be read of them, and what can't, in words."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdq import files
from kdq.fields import ConfigError
from kdq.record import has_arms
from kdq.report import Record

NUMBERS = (
    *("params", "accuracy", "accuracy_last", "agreement", "kl_to_teacher", "size_bytes", "bops"),
    *("energy_modelled_nj", "train_seconds", "validation_accuracy", "validation_nll", "ece"),
    *("agreement_where_teacher_wrong", "attribution_cosine", "attribution_rank", "steps"),
    *("path_agreement", "adversarial_agreement", "accuracy_corrected", "calibration_seconds"),
    "compile_seconds",
)
NAMED = ("kind", "bits", "reference", "selected_on", "config_digest", "arm_digest", "device")
INNER = {"versions": str, "data": str, "exports": Mapping, "policy": str}  # of their values
MAPPINGS = tuple(INNER)
LARGEST = 2**63 - 1  # integers of charts
LARGEST_FLOAT = float(np.finfo(np.float32).max)  # of what charts show

# What `kdq.experiment.details` writes.
BINS = ("confidence", "accuracy", "count")
EXAMPLES = ("images", "maps", "label", "predicted", "probability")
LAYER = (
    *("path", "kind", "weight_bits", "input_bits", "weights", "bytes", "macs", "bops"),
    *("energy_modelled_nj", "sqnr_db", "range", "sensitivity"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One arm and seed: its record, and the folder with its curves and details."""

    record: Record
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """One workdir."""

    path: str
    name: str  # short, unique among those that are read together
    config: Mapping[str, Any] | None
    runs: tuple[Run, ...]
    problems: tuple[str, ...]  # what was left out, and why


def folders(paths: Sequence[str]) -> list[Folder]:
    """Reads `ARM/SEED/result.json` of every workdir.

    Raises:
      ConfigError: no workdir, one given twice, or one without a record that can be read.
    """
    if not paths:
        raise ConfigError("want --workdirs=RUNS: folders of launch/compress.py or launch/train.py")
    resolved = [Path(path).resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ConfigError(f"--workdirs: a folder is given twice: {', '.join(map(str, paths))}")
    names = [path.name for path in resolved]
    short = [n if names.count(n) == 1 else p for n, p in zip(names, paths, strict=True)]
    return [_folder(path, name) for path, name in zip(paths, short, strict=True)]


def of_records(records: Sequence[Record], workdir: Path) -> Folder:
    """A workdir of which these records are known already."""
    places = [(workdir / str(r.get("arm")) / str(r.get("seed")), r) for r in records]
    return _of(workdir, workdir.resolve().name, places, [])


def _folder(path: str, name: str) -> Folder:
    paths = sorted(Path(path).glob("*/*/result.json"))
    if not paths:
        raise ConfigError(f"--workdirs: {path} holds no ARM/SEED/result.json of a finished arm")
    problems, found = [], []
    for file in paths:
        try:
            found.append((file.parent, json_of(file)))
        except ConfigError as error:
            problems.append(str(error))
    folder = _of(Path(path), name, found, problems)
    if not folder.runs:
        raise ConfigError(f"--workdirs: no record of {path} can be read: {folder.problems[0]}")
    return folder


def _of(path: Path, name: str, found: Sequence[tuple[Path, Any]], problems: list[str]) -> Folder:
    runs, config = [], _config(path / "config.json", problems)
    for folder, content in found:
        try:
            record, wrong = cleaned(content)
        except ConfigError as error:
            problems.append(f"{folder}: {error}")
            continue
        problems += [f"{folder}: {field} is left out, as {reason}" for field, reason in wrong]
        runs.append(Run(record=record, folder=folder))
    if config:  # in the order of the config, not of the alphabet
        order = {arm: place for place, arm in enumerate(config["arms"])}
        runs.sort(key=lambda run: order.get(run.record["arm"], len(order)))
    return Folder(
        path=str(path), name=name, config=config, runs=tuple(runs), problems=tuple(problems)
    )


def _config(path: Path, problems: list[str]) -> Mapping[str, Any] | None:
    if not path.is_file():
        problems.append(f"{path} is not there: what arms start from is inferred")
        return None
    try:
        config = json_of(path)
    except ConfigError as error:
        problems.append(str(error))
        return None
    if not has_arms(config):
        problems.append(f"{path} is no config of an experiment: it has no arms")
        return None
    return config


def json_of(path: Path) -> Any:
    """The content of a JSON file. Raises ConfigError, with its name, if there is none."""
    try:
        return files.read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error


def cleaned(record: Any) -> tuple[Record, list[tuple[str, str]]]:
    """A record of which only the expected types are left, and what was not of them, and why.

    Raises ConfigError for what is no record: without an arm, a seed or a status.
    """
    if not isinstance(record, Mapping):
        raise ConfigError(f"a record is an object, given {type(record).__name__}")
    arm, seed, status = (record.get(key) for key in ("arm", "seed", "status"))
    if not (isinstance(arm, str) and type(seed) is int and isinstance(status, str)):
        raise ConfigError(f"no record: arm={arm!r}, seed={seed!r}, status={status!r}")
    wanted = {
        **dict.fromkeys(NUMBERS, (int, float)),
        **dict.fromkeys(NAMED, str),
        **dict.fromkeys(MAPPINGS, Mapping),
    }
    found, wrong = dict(record), []
    for key, kind in wanted.items():
        value = found.get(key)
        if value is None:
            continue
        if not _is(value, kind):
            wrong.append((f"{key}={value!r:.60}", f"it is no {_word(kind)}"))
            del found[key]
        elif isinstance(value, float) and not math.isfinite(value):
            found[key] = None
        elif kind is Mapping and not all(_is(inner, INNER[key]) for inner in value.values()):
            reason = f"one of its values is no {_word(INNER[key])}"
            wrong.append((f"{key}={value!r:.60}", reason))
            del found[key]
    return found, wrong


def _is(value: Any, kind: Any) -> bool:
    """Returns whether a value is of a kind; a number only if a float can hold it."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return False
    return isinstance(value, kind) and not isinstance(value, bool)


def _word(kind: Any) -> str:
    return {str: "text", Mapping: "object"}.get(kind, "number")


def details(folder: Path) -> tuple[dict[str, Any], str]:
    """What `kdq.experiment.details` left of a run, and why there is nothing, or ""."""
    path = folder / "details.json"
    if not path.is_file():
        return {}, f"{path} is not there: it is from before details were kept"
    try:
        found = json_of(path)
    except ConfigError as error:
        return {}, str(error)
    try:
        _check_details(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return {}, f"{path} is no file of details: {error!r}"
    return found, ""


def _check_details(found: Any) -> None:
    """Raises whatever comes first where something is missing, or of another type or shape."""
    classes = len(found["confusion"])
    if _array(found["confusion"]).shape != (classes, classes):
        raise ValueError("a confusion matrix that is not square")
    for part, keys in (("reliability", BINS), ("attributions", EXAMPLES)):
        if found[part] is not None:
            arrays = [_array(found[part][key], missing=part == "reliability") for key in keys]
            if len({array.shape[0] for array in arrays}) != 1:
                raise ValueError(f"lists of different lengths in {part}")
    for row in found["layers"]:
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


def curve(folder: Path, *, every: bool = True) -> list[dict[str, Any]]:
    """The entries of `metrics.jsonl` that can be read; a line that was cut off is none.

    Args:
      folder: of an arm and seed.
      every: all of them, or those of validation alone.
    """
    path, found = folder / "metrics.jsonl", []
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
            found.append({key: value for key, value in entry.items() if _is_charted(value)})
    return found
