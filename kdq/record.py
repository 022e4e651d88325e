"""Checks of the record of an arm and seed, for whoever reads it."""

import math
from collections.abc import Mapping
from typing import Any

from kdq.fields import ConfigError

STATUSES = ("ok", "failed")
# Types and ranges of what is there: versions differ in what they measure.
TEXTS = (
    *("kind", "bits", "arm_digest", "observer", "reference", "config_digest", "commit", "device"),
    *("error", "selected_on", "weights_sha256", "peer_sha256", "packed_sha256"),
)
SHARES = ("accuracy", "accuracy_last", "validation_accuracy", "accuracy_corrected", "agreement")
COUNTS = ("params", "size_bytes", "train_seconds", "steps", "selected_step", "bops", "macs")
NUMBERS = (
    *("nll", "nll_last", "validation_nll", "kl_to_teacher", "ece", "adaptive_ece", "brier"),
    *("top5_accuracy", "agreement_where_teacher_wrong", "attribution_cosine", "attribution_rank"),
    *("path_agreement", "adversarial_agreement", "class_offset", "energy_modelled_nj"),
    *("calibration_seconds", "compile_seconds"),
)
OBJECTS = ("versions", "data", "exports", "policy", "search")


def check(record: Any) -> None:
    """Raises ConfigError for what is no record."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"want an object, got {type(record).__name__}")
    want(record, "arm", isinstance(record.get("arm"), str), "text")
    want(record, "seed", type(record.get("seed")) is int, "a whole number")
    want(record, "status", record.get("status") in STATUSES, " or ".join(STATUSES))
    there = {key: value for key, value in record.items() if value is not None}
    number = lambda key: _number(there[key])
    for key in there.keys() & {*TEXTS}:
        want(record, key, isinstance(there[key], str), "text")
    for key in there.keys() & {*SHARES}:
        want(record, key, 0 <= number(key) <= 1, "a number from 0 to 1")
    for key in there.keys() & {*COUNTS}:
        want(record, key, 0 <= number(key) < math.inf, "a number of at least 0")
    for key in there.keys() & {*NUMBERS}:
        want(record, key, math.isfinite(number(key)), "a finite number")
    for key in there.keys() & {*OBJECTS}:
        want(record, key, isinstance(there[key], Mapping), "an object")
    for key in there.keys() & {"data", "policy", "versions"}:
        texts = all(isinstance(value, str) for value in there[key].values())
        want(record, key, texts, "an object of texts")
    for name, entry in (there.get("exports") or {}).items():
        want(record, "exports", _is_export(entry), f"the measurements of {name!r}")


def has_arms(config: Any) -> bool:
    """Returns whether a JSON value is the config of an experiment, as far as its arms go."""
    arms = config.get("arms") if isinstance(config, Mapping) else None
    return isinstance(arms, Mapping) and all(isinstance(arm, Mapping) for arm in arms.values())


def want(record: Mapping[str, Any], key: str, fulfilled: bool, wanted: str) -> None:
    """Raises ConfigError for a field of a record that is not as wanted."""
    if not fulfilled:
        raise ConfigError(f"{key}={_shortened(record.get(key))}: want {wanted}")


def _is_export(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    sizes = entry.get("latency") or {}
    if not isinstance(sizes, Mapping) or not math.isfinite(_number(entry.get("size_bytes", 0))):
        return False
    timed = {size: times for size, times in sizes.items() if size != "conditions"}
    conditions = sizes.get("conditions")
    if sizes and not (isinstance(conditions, Mapping) and _is_text(conditions.get("device"))):
        return False
    return all(
        size.isdigit()
        and isinstance(times, Mapping)
        and math.isfinite(_number(times.get("milliseconds")))
        for size, times in timed.items()
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


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
