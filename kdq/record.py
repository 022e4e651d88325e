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

from kdq import fields, files
from kdq.fields import ConfigError, field

STATUSES = ("ok", "failed")
NEEDED = ("arm", "seed", "status")  # in JSON
NULLABLE = ("observer", "reference")  # null in JSON where there is none, instead of left out


def _share() -> Any:
    return field(None, at_least=0, at_most=1)


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
    # On test, of the selected weights and, `_last`, of those after the last step.
    accuracy: float | None = _share()
    nll: float | None = None  # nats
    accuracy_last: float | None = _share()
    nll_last: float | None = None
    # Against the teacher, on test.
    agreement: float | None = _share()
    kl_to_teacher: float | None = None  # nats
    agreement_where_teacher_wrong: float | None = None
    top5_accuracy: float | None = None
    brier: float | None = None
    ece: float | None = None
    adaptive_ece: float | None = None
    accuracy_by_class: tuple[float, ...] = ()
    validation_accuracy: float | None = _share()
    validation_nll: float | None = None
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
    accuracy_corrected: float | None = _share()
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
        """Returns the record that a JSON object holds.

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
        known = _hints()
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
        return cls(**values, extra=extra)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON form."""
        document = {}
        for each in dataclasses.fields(self)[:-1]:
            value = getattr(self, each.name)
            if each.name in NULLABLE:
                document[each.name] = value or None
            elif each.name in NEEDED or _is_measured(value):
                document[each.name] = value
        return files.plain(document | dict(self.extra))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArmRecord) and self.to_json() == other.to_json()

    __hash__ = None

    def require(self, *names: str) -> None:
        """Raises ConfigError if one of these fields is not there or has no value."""
        for name in names:
            value = getattr(self, name)
            if value in ("", None) or value != value:
                raise ConfigError(f"{name} is missing")


def has_arms(config: Any) -> bool:
    """Returns whether a JSON value is the config of an experiment, as far as its arms go."""
    arms = config.get("arms") if isinstance(config, Mapping) else None
    return isinstance(arms, Mapping) and all(isinstance(arm, Mapping) for arm in arms.values())


@functools.cache
def _hints() -> dict[str, Any]:
    """Returns the types of the fields that JSON may have."""
    return {name: hint for name, hint in fields.hints(ArmRecord).items() if name != "extra"}


def _is_measured(value: Any) -> bool:
    """Returns whether a field is not at its default; 0 and NaN are measured."""
    return (isinstance(value, int | float) and value is not False) or bool(value)


def _read(name: str, value: Any) -> Any:
    """Returns the value of a field. Raises ConfigError for one that it can't have."""
    hint, expected = _hints()[name], ""
    if hint is str and not isinstance(value, str):
        expected = "text"
    elif typing.get_origin(hint) is Mapping:
        texts = hint == Mapping[str, str]
        if not isinstance(value, Mapping):
            expected = "an object"
        elif texts and not all(isinstance(inner, str) for inner in value.values()):
            expected = "an object of texts"
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
