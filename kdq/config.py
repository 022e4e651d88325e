"""Configs: what a config file may say, checked and frozen before anything runs.

A config file is Python with `get_config(arg)`, which returns an `ml_collections.ConfigDict` that
spells out the fields below. `freeze` turns it into an `Experiment`: frozen, typed, every name
checked, with the valid ones in the error.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections


class ConfigError(ValueError):
    """A config that can't be run; the message says which key, what it held, what it may hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which examples, and what is done to them."""

    name: str  # a TFDS image-classification data set
    data_dir: str = ""  # where TFDS keeps it; "" is TFDS's own default
    train: str = "train"  # TFDS split expressions
    validation: str = "validation"  # every choice is made on this one
    test: str = "test"  # measured once, at the end
    batch_size: int = 64
    eval_batch_size: int = 512
    augment: tuple[Mapping[str, Any], ...] = ()  # e.g. ({"name": "shift", "pixels": 2},)
    mean: float | tuple[float, ...] = 0.0  # pixels become (pixel - mean) / std
    std: float | tuple[float, ...] = 255.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Shared by every arm; an arm's own `learning_rate` is its peak. Cosine decay to zero."""

    name: str = "adam"
    warmup: float = 0.05  # share of the steps in which the rate rises linearly from zero
    scale_rate: float = 0.1  # quantizer scales train at this multiple of the rate
    weight_decay: float = 0.0  # decoupled, on weights of two or more dimensions
    clip_norm: float = 0.0  # global gradient norm; 0 is no clipping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Shared by every quantized arm; an arm's own `bits` apply to the layers not kept."""

    keep: tuple[str, ...] = ()  # path patterns of the layers at `keep_bits`: the first, the last
    keep_bits: int = 8
    calibration_examples: int = 512  # the first of the training split
    # Scales train (learned step sizes) but for those whose "LAYER/weights" or "LAYER/activations"
    # matches one of these patterns, which stay as calibrated; (".*",) trains none.
    fixed_scales: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One cell of the experiment. All arms go the same way: start, calibrate, train, measure."""

    model: str  # a key of `models`
    init: str = ""  # arm whose selected weights this one starts from; "" is fresh weights
    teacher: str = ""  # arm that teaches; "" is labels only
    bits: str = ""  # "W4A4", "W4" (weights only), or "" for float
    observer: str = "mse"  # calibration: absmax, min_max, moving_average, percentile, mse
    epochs: float = 0.0  # passes over the training split; 0 only calibrates
    learning_rate: float = 1e-3  # peak
    alpha: float = 0.9  # weight of the teacher: (1 - alpha) CE + alpha T² KL
    temperature: float = 4.0
    augment: bool = True  # trains on images changed as `data.augment` says, if it says anything
    reference: str = ""  # arm to compare with in the table, seed by seed

    @property
    def kind(self) -> str:
        """What the arm is, in the field's terms."""
        if self.bits:
            return "PTQ" if not self.epochs else "QAD" if self.teacher else "QAT"
        return "KD" if self.teacher else "labels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A set of arms over the same data, splits and seeds."""

    seeds: tuple[int, ...]
    data: Data
    models: Mapping[str, Mapping[str, Any]]  # {key: {"name": module of kdq.models, **fields}}
    arms: Mapping[str, Arm]  # in the order of the table
    teacher: str = "teacher"  # arm that fidelity and sizes are measured against
    optimizer: Optimizer = Optimizer()
    quantize: Quantize = Quantize()
    evaluations: int = 20  # times that an arm is validated while it trains
    checkpoint_seconds: float = 30.0  # least time between two checkpoints; 0 is every validation
    cache_teacher: bool = True  # teach from logits computed once; needs training without augment


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """The part after ":" in `--config=FILE:quick,seeds=10`, with the types of `defaults`.

    A bare name sets a boolean. Raises ConfigError for a name that `defaults` does not have.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, _, text = item.partition("=")
        name = name.strip()
        if name not in defaults:
            raise ConfigError(unknown("config argument", name, defaults))
        kind = type(defaults[name])
        if kind is bool:
            if text.lower() not in ("", "true", "false", "1", "0"):
                raise ConfigError(f"config argument {name}={text!r}: want true or false")
            values[name] = text.lower() in ("", "true", "1")
            continue
        try:
            values[name] = kind(text)
        except ValueError as error:
            raise ConfigError(f"config argument {name}={text!r}: want {kind.__name__}") from error
    return ml_collections.ConfigDict(values)


def arm(**fields: Any) -> dict[str, Any]:
    """An arm for a config file, with every field spelled out so that a flag can override it."""
    return dataclasses.asdict(_build(Arm, fields, "arm"))


def unknown(what: str, given: Any, valid: Iterable[str]) -> str:
    """The message for a name that is none of the valid ones."""
    valid = list(valid)
    hint = did_you_mean(given, valid)
    return f"unknown {what} {given!r}{hint}; valid: {', '.join(valid) or 'none'}"


def did_you_mean(given: Any, valid: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the valid name closest to `given`, or an empty string."""
    close = difflib.get_close_matches(str(given), list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def freeze(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """The checked, frozen form of a config.

    Raises:
      ConfigError: an unknown or missing key, a value of the wrong type, an arm that names an arm or
        model that is not there or that depends on itself.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    experiment = _build(Experiment, config, "config")
    _check(experiment)
    return experiment


def _check(experiment: Experiment) -> None:
    if not experiment.seeds or len(set(experiment.seeds)) != len(experiment.seeds):
        raise ConfigError(f"config.seeds={experiment.seeds}: want one seed or more, all different")
    if experiment.teacher not in experiment.arms:
        raise ConfigError(unknown("config.teacher: arm", experiment.teacher, experiment.arms))
    for key, positive in (
        ("evaluations", experiment.evaluations),
        ("data.batch_size", experiment.data.batch_size),
        ("data.eval_batch_size", experiment.data.eval_batch_size),
        ("quantize.calibration_examples", experiment.quantize.calibration_examples),
    ):
        if positive < 1:
            raise ConfigError(f"config.{key}={positive}: want at least 1")
    if not 1 <= experiment.quantize.keep_bits <= 8:
        raise ConfigError(f"config.quantize.keep_bits={experiment.quantize.keep_bits}: want 1 to 8")
    for pattern in experiment.quantize.fixed_scales:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"config.quantize.fixed_scales: {pattern!r} is no regular expression: {error}"
            ) from error
    for name, model in experiment.models.items():
        if "name" not in model:
            raise ConfigError(f"config.models.{name}.name is missing: a module of kdq.models")
    for name, one in experiment.arms.items():
        where = f"config.arms.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_\-]*", name):
            raise ConfigError(f"{where}: an arm's name is a folder; want letters, digits, _ and -")
        if one.model not in experiment.models:
            raise ConfigError(unknown(f"{where}.model:", one.model, experiment.models))
        for field in ("init", "teacher", "reference"):
            other = getattr(one, field)
            if other and other not in experiment.arms:
                raise ConfigError(unknown(f"{where}.{field}: arm", other, experiment.arms))
        if one.init and experiment.arms[one.init].model != one.model:
            raise ConfigError(
                f"{where}.init={one.init!r} is a {experiment.arms[one.init].model!r}, "
                f"but the arm is a {one.model!r}: want an arm of the same model"
            )
        if one.init and experiment.arms[one.init].bits and not one.bits:
            raise ConfigError(f"{where}.init={one.init!r} is quantized, but the arm is float")
        parse_bits(one.bits, where=f"{where}.bits")
        if one.epochs < 0 or not (one.epochs or one.init):
            raise ConfigError(f"{where}.epochs={one.epochs}: want more than 0, or an init to keep")
        if not 0 <= one.alpha <= 1:
            raise ConfigError(f"{where}.alpha={one.alpha}: want 0 to 1")
        if one.temperature <= 0 or one.learning_rate <= 0:
            raise ConfigError(f"{where}: temperature and learning_rate must be above 0")
        ancestors(experiment, name)
        if experiment.cache_teacher and experiment.data.augment and one.teacher and one.augment:
            raise ConfigError(
                f"{where}.augment=True with config.cache_teacher=True and config.data.augment: "
                "logits computed once do not fit augmented images; change one of the three"
            )


def ancestors(experiment: Experiment, name: str) -> tuple[str, ...]:
    """The arms that `name` needs, itself last, each after what it needs itself.

    Raises ConfigError if an arm needs itself.
    """
    order: list[str] = []

    def visit(current: str, trail: tuple[str, ...]) -> None:
        if current in trail:
            raise ConfigError(f"arms need each other in a circle: {' -> '.join((*trail, current))}")
        if current in order:
            return
        one = experiment.arms[current]
        for parent in filter(None, (one.init, one.teacher)):
            visit(parent, (*trail, current))
        order.append(current)

    visit(name, ())
    return tuple(order)


def parse_bits(bits: str, where: str = "bits") -> tuple[int | None, int | None]:
    """`"W4A8"` -> (4, 8), `"W4"` -> (4, None), `"A8"` -> (None, 8), `""` -> (None, None)."""
    found = re.fullmatch(r"(?:W([1-8]))?(?:A([1-8]))?", bits)
    if not found:
        raise ConfigError(f"{where}={bits!r}: want 'W4A4', 'W4', 'A8' or '' with bits from 1 to 8")
    weights, activations = found.groups()
    return (int(weights) if weights else None, int(activations) if activations else None)


def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a config value's canonical JSON."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(value: Any) -> Any:
    """Dataclasses, mappings and tuples as what `json` writes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def _build(cls: type, fields: Any, where: str) -> Any:
    """A dataclass from a mapping; nested dataclasses by their annotations."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where}={fields!r}: want a mapping")
    hints = typing.get_type_hints(cls)
    for key in fields:
        if key not in hints:
            raise ConfigError(unknown(f"key in {where}:", key, hints))
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING
        if required and field.name not in fields:
            raise ConfigError(f"{where}.{field.name} is missing")
    return cls(**{k: _coerce(hints[k], v, f"{where}.{k}") for k, v in fields.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it: tuples for lists, whole numbers as floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin is types.UnionType:
        errors = []
        for option in args:
            try:
                return _coerce(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError("; or ".join(errors))
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{where}={value!r}: want a list or tuple")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: want a mapping")
        return {str(k): _coerce(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return tuple(_coerce(Any, v, where) for v in value) if isinstance(value, list) else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value!r}: want a finite number")
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r}: want {hint.__name__}")
    return value
