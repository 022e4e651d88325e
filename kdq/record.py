"""The record of one arm and seed: all that a run measured and what the numbers came from.

`ArmRecord` is the one table of a record's fields, with their types and limits, and the one reader
and writer of its JSON form: `ARM/SEED/result.json`, and the entries of `results.json`.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any

from kdq import fields, files, tasks
from kdq.fields import ConfigError, Limits, field

STATUSES = ("ok", "failed")
NEEDED = ("arm", "seed", "status")  # in JSON
NULLABLE = ("observer", "reference")  # null in JSON where there is none, instead of left out
# Fields of version 1, which knew no other task than classification -> (split, metric).
_VERSION_1 = {
    "accuracy": ("test", "accuracy"),
    "nll": ("test", "nll"),
    "accuracy_last": ("test_last", "accuracy"),
    "nll_last": ("test_last", "nll"),
    "validation_accuracy": ("validation", "accuracy"),
    "validation_nll": ("validation", "nll"),
    "agreement": ("fidelity", "agreement"),
    "kl_to_teacher": ("fidelity", "kl_to_teacher"),
}


def _amount() -> Any:
    return field(None, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArmRecord:
    """One arm and seed: what it is and what was measured of it.

    A field at its default was not measured, and is left out of the JSON form; a NaN was measured
    and has no value (the agreement with a teacher that there is not), and is null there. Records
    are equal if their JSON forms are.
    """

    arm: str = field(some=True)
    seed: int
    kind: str = ""  # "teacher", or a kind of kdq.config.Arm
    bits: str = ""  # "fp32" for float
    observer: str = ""  # of its calibration, "" for float
    reference: str = ""  # the arm that it is compared with
    quick: bool = False  # a trial, whose numbers mean nothing
    # Digests of the config, without seeds, and of all that decides this arm's numbers.
    config_digest: str = ""
    arm_digest: str = ""
    commit: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # package -> version
    device: str = ""
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)  # split -> digest
    # Where its bits were searched: layer -> bits, and the result of the search.
    policy: Mapping[str, str] = dataclasses.field(default_factory=dict)
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration_seconds: float | None = None
    ptq_errors: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `quantized`
    status: str = field("ok", one_of=STATUSES)
    error: str = ""  # why it failed
    params: int | float | None = _amount()
    task: str = "classification"  # a module of kdq.tasks
    unit: str = ""  # of its targets, where these have one
    # Split -> metric of the task -> value: "validation" and "test" of the selected weights,
    # "test_last" of those after the last step.
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    # Against the teacher, on test: fidelity metric of the task -> value.
    fidelity: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Of classification alone.
    agreement_where_teacher_wrong: float | None = None
    top5_accuracy: float | None = None
    brier: float | None = None
    ece: float | None = None
    adaptive_ece: float | None = None
    accuracy_by_class: tuple[float, ...] = ()
    macs: int | float | None = _amount()  # for one example
    bops: int | float | None = _amount()
    energy_modelled_nj: float | None = None
    size_bytes: int | float | None = _amount()  # of the packed file
    train_seconds: float | None = _amount()
    steps: int | float | None = _amount()
    selected_step: int | float | None = _amount()
    selected_on: str = ""
    # SHA-256 of the selected weights, of its peer's and of the packed file.
    weights_sha256: str = ""
    peer_sha256: str = ""
    packed_sha256: str = ""
    # See kdq.experiment.transfer.
    cka: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attribution_cosine: float | None = None
    attribution_rank: float | None = None
    path_agreement: float | None = None
    adversarial_agreement: float | None = None
    # Of an arm that never saw some classes: the bias that validation chose for them, and with it
    # the accuracy on test.
    class_offset: float | None = None
    accuracy_corrected: float | None = field(None, at_least=0, at_most=1)
    accuracy_by_class_corrected: tuple[float, ...] = ()
    compile_seconds: float | None = None  # apart from the other seconds
    exports: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # by format
    failed_exports: Mapping[str, str] = dataclasses.field(default_factory=dict)  # format -> why
    shared_from: str = ""  # the folder that the arm was copied from, relative to the workdir
    # Fields that this version does not know: of a newer one, or what a sweep adds. They are kept
    # as they were read, and written again.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, document: Any, left_out: list[str] | None = None) -> "ArmRecord":
        """Returns the record that a JSON object holds, in the form of any version.

        Args:
          document: the object.
          left_out: None refuses a field of another type or beyond its limits; a list gets the
            reason, and the field is as if it had not been measured.

        Raises:
          ConfigError: a wrong field; in any case for what is no record, without an arm, a seed or
            a status.
        """
        if not isinstance(document, Mapping):
            raise ConfigError(f"expected an object, got {type(document).__name__}")
        values: dict[str, Any] = {}
        known, document = _hints(), _upgraded(document)
        for name, value in document.items():
            if name not in known or value is None:
                continue
            try:
                values[name] = _read(name, value)
            except ConfigError as error:
                if left_out is None or name in NEEDED:
                    raise
                left_out.append(str(error))
        for name in NEEDED:
            if name not in values:
                raise ConfigError(f"{name} is missing")
        # A number that is null was measured, and has no value.
        nulls = [name for name, hint in known.items() if hint == float | None]
        values |= {name: math.nan for name in nulls if document.get(name, 0) is None}
        extra = {name: value for name, value in document.items() if name not in known}
        record = cls(**values, extra=extra)
        limited = functools.partial(_limited, _shares(record.task), left_out=left_out)
        metrics = {
            split: limited(inner, f"metrics.{split}") for split, inner in record.metrics.items()
        }
        fidelity = limited(record.fidelity, "fidelity")
        return dataclasses.replace(record, metrics=metrics, fidelity=fidelity)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON form."""
        document = {}
        for each in dataclasses.fields(self)[:-1]:
            value = getattr(self, each.name)
            if each.name in NULLABLE:
                document[each.name] = value or None
                continue
            is_number = isinstance(value, int | float) and value is not False  # 0 is measured
            if each.name in NEEDED or value or is_number:
                document[each.name] = value
        return files.plain(document | dict(self.extra))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArmRecord) and self.to_json() == other.to_json()

    __hash__ = None

    def value(self, name: str, split: str = "test") -> Any:
        """Returns what was measured under a name; None if it was not.

        Args:
          name: of a metric or a fidelity metric of the task, or of a field, known or not.
          split: of a metric: "test", "test_last" or "validation".
        """
        if name in self.metrics.get(split, {}):
            return self.metrics[split][name]
        if name in self.fidelity:
            return self.fidelity[name]
        return getattr(self, name) if name in _hints() else self.extra.get(name)

    def require(self, *names: str) -> None:
        """Raises ConfigError if one of these metrics or fields is not there or has no value."""
        for name in names:
            value = self.value(name)
            if value in ("", None) or value != value:
                raise ConfigError(f"{name} is missing")


def has_arms(config: Any) -> bool:
    """Returns whether a JSON value is the config of an experiment, as far as its arms go."""
    arms = config.get("arms") if isinstance(config, Mapping) else None
    return isinstance(arms, Mapping) and all(isinstance(arm, Mapping) for arm in arms.values())


def _upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record's JSON object with metrics where this version has them."""
    if document.keys().isdisjoint(_VERSION_1):
        return dict(document)
    splits: dict[str, dict[str, Any]] = {}
    for name, (split, metric) in _VERSION_1.items():
        if name in document:
            splits.setdefault(split, {})[metric] = document[name]
    kept = {name: value for name, value in document.items() if name not in _VERSION_1}
    return {**kept, "fidelity": splits.pop("fidelity", {}), "metrics": splits}


@functools.cache
def _shares(task: str) -> frozenset[str]:
    """Returns the names of a task's metrics that are in [0, 1]."""
    if task not in tasks.names():  # of a newer version
        return frozenset()
    metrics = (*tasks.build(task).metrics, *tasks.build(task).fidelity)
    return frozenset(metric.name for metric in metrics if metric.unit == "%")


def _limited(
    shares: frozenset[str], values: Mapping[str, Any], where: str, left_out: list[str] | None
) -> dict[str, float]:
    """Returns metrics by name, a null as NaN. Raises ConfigError, or leaves out as `from_json`."""
    numbers = {}
    for name, value in values.items():
        try:
            number = math.nan if value is None else fields.number(value, f"{where}.{name}")
            if name in shares and value is not None:
                Limits(at_least=0, at_most=1).check(number, f"{where}.{name}")
            numbers[name] = number
        except ConfigError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    return numbers


@functools.cache
def _hints() -> dict[str, Any]:
    """Returns the types of the fields that JSON may have."""
    return {name: hint for name, hint in fields.hints(ArmRecord).items() if name != "extra"}


def _read(name: str, value: Any) -> Any:
    """Returns the value of a field. Raises ConfigError for one that it can't have."""
    hint, expected = _hints()[name], ""
    if hint is str and not isinstance(value, str):
        expected = "text"
    elif typing.get_origin(hint) is Mapping:
        texts = hint == Mapping[str, str]
        nested = hint == Mapping[str, Mapping[str, float]]
        if not isinstance(value, Mapping):
            expected = "an object"
        elif texts and not all(isinstance(inner, str) for inner in value.values()):
            expected = "an object of texts"
        elif nested and not all(isinstance(inner, Mapping) for inner in value.values()):
            expected = "an object of objects"
        elif name == "exports" and not all(map(_is_export, value.values())):
            expected = "an object of the measurements of files"
    if expected:
        raise ConfigError(f"{name}={fields.shortened(value)}: expected {expected}")
    if hint is str or isinstance(value, Mapping):  # whatever is in them, which is not computed with
        fields.limits_of(ArmRecord, name).check(value, name)
        return value
    if hint == tuple[float, ...] and isinstance(value, list):
        fields.convert(ArmRecord, name, [v for v in value if v is not None], name)
        return tuple(math.nan if v is None else float(v) for v in value)
    return fields.convert(ArmRecord, name, value, name)


def _is_export(entry: Any) -> bool:
    """Returns whether sizes and times in an entry of a manifest of exports are numbers."""
    if not isinstance(entry, Mapping):
        return False
    latency = entry.get("latency") or {}
    if not isinstance(latency, Mapping) or not _is_finite(entry.get("size_bytes", 0)):
        return False
    conditions = latency.get("conditions")
    if latency and not (
        isinstance(conditions, Mapping) and isinstance(conditions.get("device"), str)
    ):
        return False
    return all(
        size.isdigit() and isinstance(times, Mapping) and _is_finite(times.get("milliseconds"))
        for size, times in latency.items()
        if size != "conditions"
    )


def _is_finite(value: Any) -> bool:
    """Returns whether a value is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= fields.LARGEST
