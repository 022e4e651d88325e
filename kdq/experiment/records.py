"""What a record must be, and how it names the weights and the file that it is about."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kdq.config import ConfigError
from kdq.distill.cache_key import digest_variables
from kdq.experiment.progress import Record
from kdq.train.loop import Selection
from kdq.types import Variables

STATUSES = ("ok", "failed")
TEXTS = ("kind", "bits", "arm_digest")
# Where they are there: versions differ in what they measure.
SHARES = ("accuracy", "accuracy_last", "validation_accuracy", "accuracy_corrected", "agreement")
COUNTS = ("params", "size_bytes", "train_seconds", "steps", "selected_step", "bops", "macs")
OPTIONAL = {
    **dict.fromkeys(("nll", "nll_last", "validation_nll", "kl_to_teacher", "ece"), float),
    **dict.fromkeys(("energy_modelled_nj", "calibration_seconds", "class_offset"), float),
    **dict.fromkeys(("agreement_where_teacher_wrong", "attribution_cosine"), float),
    **dict.fromkeys(("attribution_rank", "path_agreement"), float),
    **dict.fromkeys(("top5_accuracy", "brier", "adaptive_ece", "adversarial_agreement"), float),
    **dict.fromkeys(("observer", "reference", "config_digest", "commit", "device", "error"), str),
    **dict.fromkeys(("selected_on", "weights_sha256", "peer_sha256", "packed_sha256"), str),
    **dict.fromkeys(("versions", "data", "exports", "policy", "search"), Mapping),
}


def check(record: Any, name: str, seed: int) -> None:
    """Raises ConfigError for what is no record of an arm and seed."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"want an object, got {type(record).__name__}")
    _want(record, "arm", record.get("arm") == name, repr(name))
    _want(record, "seed", record.get("seed") == seed, str(seed))
    _want(record, "status", record.get("status") in STATUSES, " or ".join(STATUSES))
    for key in TEXTS:
        _want(record, key, isinstance(record.get(key), str), "text")
    if record["status"] == "ok":
        _want(record, "accuracy", record.get("accuracy") is not None, "a number")
    there = {key: value for key, value in record.items() if value is not None}
    for key in there.keys() & {*SHARES}:
        _want(record, key, 0 <= _number(there[key]) <= 1, "a number from 0 to 1")
    for key in there.keys() & {*COUNTS}:
        _want(record, key, 0 <= _number(there[key]) < math.inf, "a number of at least 0")
    for key in there.keys() & OPTIONAL.keys():
        kind = OPTIONAL[key]
        if kind is float:
            _want(record, key, math.isfinite(_number(there[key])), "a finite number")
        else:
            word = "text" if kind is str else "an object"
            _want(record, key, isinstance(there[key], kind), word)
    for key, entry in (record.get("exports") or {}).items():
        _want(record, "exports", isinstance(entry, Mapping), f"an object for {key!r}")


def _want(record: Record, key: str, fulfilled: bool, wanted: str) -> None:
    if not fulfilled:
        raise ConfigError(f"{key}={_shortened(record.get(key))}: want {wanted}")


def _number(value: Any) -> float:
    """Returns a number as a float; what is none, or too large, as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _shortened(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def variables_of(parts: Mapping[str, Any]) -> Variables:
    """Returns {"params", "model_state"} as a model takes it."""
    return jax.tree.map(jnp.asarray, {"params": parts["params"], **parts["model_state"]})


def digests_of(selection: Selection) -> Record:
    """Returns the part of a record that names the weights that training selected, and its peer's.

    Nothing for an arm that was not trained, which has none of its own to hand on.
    """
    record = {}
    if selection.step:
        record["weights_sha256"] = digest_variables(selection.weights.variables)
    if selection.peer:
        record["peer_sha256"] = digest_variables(variables_of(selection.peer))
    return record


def is_about(record: Record, networks: Mapping[str, Variables], step: int) -> bool:
    """Whether a record is about networks ("weights", "peer") that were selected at a step."""
    if "weights_sha256" not in record:  # it is from before there were digests
        return step == record.get("selected_step")
    return all(
        digest_variables(variables) == record.get(f"{name}_sha256")
        for name, variables in networks.items()
    )


def check_packed(record: Record, path: Path) -> None:
    """Raises ConfigError if the packed file, where it is there, is another than the record's."""
    expected = record.get("packed_sha256")
    if expected and path.exists() and file_digest(path) != expected:
        raise ConfigError(
            f"{path} is damaged, or not the file that its result.json is about: delete both, and "
            "the same command makes them again from the arm's checkpoint"
        )


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
