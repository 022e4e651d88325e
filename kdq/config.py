"""Configs: what a config file may say, checked and frozen before anything runs.

A config file is Python with `get_config(arg)`, which returns an `ml_collections.ConfigDict` that
spells out the fields of `kdq.schema`. `freeze` turns it into an `Experiment`: frozen, typed, every
name checked, with the valid ones in the error.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from kdq.fields import ConfigError, build, did_you_mean, unknown
from kdq.schema import (
    SEEDS,
    TEACHERS,
    Arm,
    Cache,
    Data,
    Distill,
    Experiment,
    Export,
    Optimizer,
    Peer,
    Quantize,
    Resources,
    Search,
    TeacherConfig,
)

__all__ = [
    "Arm",
    "Cache",
    "ConfigError",
    "Data",
    "Distill",
    "Experiment",
    "Export",
    "Optimizer",
    "Quantize",
    "Resources",
    "Search",
    "ancestors",
    "arm",
    "complete",
    "did_you_mean",
    "digest",
    "freeze",
    "parents",
    "parse_arg",
    "parse_bits",
    "resources",
    "to_json",
    "unknown",
]

BITS = r"(?:W([1-8]))?(?:A([1-8]))?"  # what an arm's `bits` may be, beside a key of `rules`


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
                raise ConfigError(f"config argument {name}={text!r}: expected true or false")
            values[name] = text.lower() in ("", "true", "1")
            continue
        try:
            values[name] = kind(text)
        except ValueError as error:
            raise ConfigError(
                f"config argument {name}={text!r}: expected {kind.__name__}"
            ) from error
    return ml_collections.ConfigDict(values)


def arm(**fields: Any) -> dict[str, Any]:
    """An arm for a config file, with every field spelled out so that a flag can override it."""
    return dataclasses.asdict(build(Arm, fields, "arm"))


def export(**fields: Any) -> dict[str, Any]:
    """The export section of a config file, likewise."""
    return dataclasses.asdict(build(Export, fields, "export"))


def search(**fields: Any) -> dict[str, Any]:
    """A search for a config file, likewise."""
    return dataclasses.asdict(build(Search, fields, "search"))


def resources(**fields: Any) -> dict[str, Any]:
    """The resources of a config file, likewise."""
    return dataclasses.asdict(build(Resources, fields, "resources"))


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """What a config file says and what it leaves at its default, which flags can override then."""
    for field in dataclasses.fields(Experiment):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            config[field.name] = {**dataclasses.asdict(default), **config.get(field.name, {})}
        elif default is not dataclasses.MISSING and field.name not in config:
            config[field.name] = default
    return config


def freeze(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """The checked, frozen form of a config.

    Raises:
      ConfigError: an unknown or missing key, a value of the wrong type, an arm that names an arm or
        model that is not there or that depends on itself.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    experiment = build(Experiment, config, "config")
    teachers = {name: _teacher(name, one) for name, one in experiment.teachers.items()}
    models, compute = dict(experiment.models), experiment.compute
    if compute.dtype:
        models = {name: {**fields, "dtype": compute.dtype} for name, fields in models.items()}
        compute = dataclasses.replace(compute, dtype="")
    experiment = dataclasses.replace(experiment, teachers=teachers, models=models, compute=compute)
    _check(experiment)
    return experiment


def _teacher(name: str, fields: Any) -> TeacherConfig:
    where = f"config.teachers.{name}"
    kind = fields.get("kind") if isinstance(fields, Mapping) else fields
    if kind not in TEACHERS:
        raise ConfigError(unknown(f"{where}.kind:", kind, TEACHERS))
    return build(TEACHERS[kind], fields, where)


def _check(experiment: Experiment) -> None:
    """Raises ConfigError for fields that do not fit each other; each by itself `build` has seen."""
    if experiment.teacher not in experiment.arms:
        raise ConfigError(unknown("config.teacher: arm", experiment.teacher, experiment.arms))
    for name, model in experiment.models.items():
        if "name" not in model:
            raise ConfigError(f"config.models.{name}.name is missing: a module of kdq.models")
    for name in experiment.export.arms:
        if name not in experiment.arms:
            raise ConfigError(unknown("config.export.arms: arm", name, experiment.arms))
    for section in ("rules", "searches"):
        for name in getattr(experiment, section):
            if re.fullmatch(BITS, name):
                raise ConfigError(
                    f"config.{section}.{name}: that name has a meaning of its own, as bits"
                )
    for name, search in experiment.searches.items():
        if name in experiment.rules:
            raise ConfigError(f"config.searches.{name}: there are rules of that name")
        _check_search(experiment, search, f"config.searches.{name}")
    _check_cache(experiment.cache)
    for name in experiment.teachers:
        _check_teacher(experiment, name)
    for name in experiment.arms:
        _check_arm(experiment, name)
        _check_taught(experiment, name)
    ancestors(experiment, *experiment.arms)  # whose parents are all there


def _check_search(experiment: Experiment, one: Search, where: str) -> None:
    if not one.students:
        raise ConfigError(f"{where}.students is empty: expected a float arm or more")
    for field in ("students", "teacher", "finetune"):
        value = getattr(one, field)
        for arm in value if field == "students" else filter(None, (value,)):
            if arm not in experiment.arms:
                raise ConfigError(unknown(f"{where}.{field}: arm", arm, experiment.arms))
            if field != "finetune" and experiment.arms[arm].bits:
                raise ConfigError(f"{where}.{field}: {arm!r} is quantized; expected a float arm")
    if not one.teacher:
        raise ConfigError(f"{where}.teacher is missing: the arm that policies are compared with")
    for i, bits in enumerate(one.choices):
        parse_bits(bits, f"{where}.choices[{i}]")
    for pattern, bits in one.fixed.items():
        parse_bits(bits, f"{where}.fixed[{pattern!r}]")
    if not one.most.set and not one.share.set:
        raise ConfigError(
            f"{where}: no budget; expected `most` or `share`, e.g. most.average_bits=3"
        )
    if both := one.most.set.keys() & one.share.set.keys():
        raise ConfigError(f"{where}: expected `most` or `share` of {sorted(both)}, not both")
    if one.steps and not one.finetune:
        raise ConfigError(f"{where}.steps={one.steps}: needs `finetune`, the arm to train as")
    if one.distilled and not one.steps:
        raise ConfigError(
            f"{where}.distilled={one.distilled}: only a finetune tells, expected steps"
        )
    if one.distilled:
        recipe = experiment.arms[one.finetune].distill
        terms = experiment.distill[recipe].terms if recipe in experiment.distill else ()
        for term in one.distilled:
            if term not in terms:
                raise ConfigError(unknown(f"{where}.distilled: term", term, terms))


def _check_cache(cache: Cache) -> None:
    sparse = cache.kind in ("top_k", "sampled")
    if sparse != (cache.size > 0):
        raise ConfigError(
            f"config.cache: size={cache.size} with kind={cache.kind!r}; expected at least 1 with "
            "'top_k' and 'sampled', 0 with the others"
        )


def _check_teacher(experiment: Experiment, name: str) -> None:
    where, one = f"config.teachers.{name}", experiment.teachers[name]
    if name in experiment.arms:
        raise ConfigError(
            f"{where}: there is an arm of that name; an arm's teacher names one of them"
        )
    for arm in one.needs:
        if arm not in experiment.arms:
            raise ConfigError(unknown(f"{where}: arm", arm, experiment.arms))
    if one.kind == "ensemble" and one.weights and len(one.weights) != len(one.arms):
        raise ConfigError(
            f"{where}.weights={one.weights}: expected {len(one.arms)} numbers, or none"
        )
    if one.kind == "peer" and one.model not in experiment.models:
        raise ConfigError(unknown(f"{where}.model:", one.model, experiment.models))
    if one.kind == "peer" and one.init:
        start = experiment.arms[one.init]
        if start.model != one.model or start.bits:
            raise ConfigError(
                f"{where}.init={one.init!r} is a {start.bits or 'float'} {start.model!r}: expected "
                f"a float {one.model!r}"
            )
    if one.kind == "former_peer" and not peer_of(experiment, one.arm):
        raise ConfigError(f"{where}.arm={one.arm!r}: it is not taught by a peer")


def peer_of(experiment: Experiment, name: str) -> Peer | None:
    """The peer that teaches the arm `name`, if one does."""
    teacher = experiment.teachers.get(experiment.arms[name].teacher)
    return teacher if isinstance(teacher, Peer) else None


def _check_arm(experiment: Experiment, name: str) -> None:
    where, one = f"config.arms.{name}", experiment.arms[name]
    if one.model not in experiment.models:
        raise ConfigError(unknown(f"{where}.model:", one.model, experiment.models))
    for field in ("init", "reference"):
        other = getattr(one, field)
        if other and other not in experiment.arms:
            raise ConfigError(unknown(f"{where}.{field}: arm", other, experiment.arms))
    if one.reference == name:
        raise ConfigError(f"{where}.reference={name!r}: expected another arm, or none")
    if one.init and experiment.arms[one.init].model != one.model:
        raise ConfigError(
            f"{where}.init={one.init!r} is a {experiment.arms[one.init].model!r}, "
            f"but the arm is a {one.model!r}: expected an arm of the same model"
        )
    if one.init and experiment.arms[one.init].bits and not one.bits:
        raise ConfigError(f"{where}.init={one.init!r} is quantized, but the arm is float")
    if one.bits in experiment.searches and one.init not in experiment.searches[one.bits].students:
        students = experiment.searches[one.bits].students
        raise ConfigError(
            f"{where}.init={one.init!r}: expected a student of its search, of {students}"
        )
    if one.bits not in (*experiment.rules, *experiment.searches):
        valid = (*experiment.rules, *experiment.searches)
        parse_bits(one.bits, where=f"{where}.bits", rules=valid)
    if one.init and one.load:
        raise ConfigError(f"{where}: init={one.init!r} and load={one.load!r}; expected one of them")
    if not (one.epochs or one.init or one.load):
        raise ConfigError(
            f"{where}.epochs={one.epochs}: expected more than 0, or an init or load to keep"
        )
    for field in ("label_smoothing", "without_classes"):
        if getattr(one, field) and not one.epochs:
            raise ConfigError(f"{where}.{field}={getattr(one, field)}: needs epochs to train in")
    if one.stop > one.epochs:
        raise ConfigError(f"{where}.stop={one.stop}: expected 0 to the {one.epochs} epochs")
    for seed in experiment.seeds:
        if not 0 <= seed + one.seed_offset < SEEDS:
            raise ConfigError(
                f"{where}.seed_offset={one.seed_offset}: with the seed {seed} that is "
                f"{seed + one.seed_offset}; expected 0 to below {SEEDS}"
            )


def _check_taught(experiment: Experiment, name: str) -> None:
    where, one = f"config.arms.{name}", experiment.arms[name]
    if one.teacher and one.teacher not in (*experiment.arms, *experiment.teachers):
        valid = (*experiment.arms, *experiment.teachers)
        raise ConfigError(unknown(f"{where}.teacher: arm or teacher", one.teacher, valid))
    guided = one.ptq and not one.epochs and one.teacher in experiment.arms
    if bool(one.teacher) != bool(one.distill) and not guided:
        raise ConfigError(
            f"{where}: teacher={one.teacher!r} with distill={one.distill!r}; expected both or "
            "neither"
        )
    if one.ptq and not one.bits:
        raise ConfigError(f"{where}.ptq={one.ptq!r}: needs bits")
    if one.ptq and one.ptq not in experiment.ptq:
        raise ConfigError(unknown(f"{where}.ptq:", one.ptq, experiment.ptq))
    if one.distill and not one.epochs:
        raise ConfigError(f"{where}.distill={one.distill!r}: needs epochs, in which it is taught")
    if one.qat and not (one.bits and one.epochs):
        raise ConfigError(f"{where}.qat={one.qat!r}: needs bits and epochs")
    if one.qat and one.qat not in experiment.qat:
        raise ConfigError(unknown(f"{where}.qat:", one.qat, experiment.qat))
    if one.distill and one.distill not in experiment.distill:
        raise ConfigError(unknown(f"{where}.distill:", one.distill, experiment.distill))


def ancestors(experiment: Experiment, *names: str) -> tuple[str, ...]:
    """The arms that `names` need and these themselves, each after what it needs itself.

    Raises ConfigError if an arm needs itself.
    """
    order: dict[str, None] = {}
    for name in names:
        # Those under way, each a parent of the one before, with its parents that are still to
        # come: a stack, since a chain of arms may be longer than Python's.
        trail = {} if name in order else {name: iter(parents(experiment, name))}
        while trail:
            current = next(reversed(trail))
            parent = next((other for other in trail[current] if other not in order), None)
            if parent is None:
                order[current] = None
                del trail[current]
            elif parent in trail:
                circle = " -> ".join([*trail, parent])
                raise ConfigError(f"arms need each other in a circle: {_shortened(circle)}")
            else:
                trail[parent] = iter(parents(experiment, parent))
    return tuple(order)


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def parents(experiment: Experiment, name: str) -> tuple[str, ...]:
    """The arms that `name` starts from, is taught by, or whose search needs them."""
    one = experiment.arms[name]
    found = [one.init, *_needed_by(experiment, one.teacher)]
    if one.bits in experiment.searches:
        search = experiment.searches[one.bits]
        found += [*search.students, search.teacher]
        if search.steps:
            found += _needed_by(experiment, experiment.arms[search.finetune].teacher)
    return tuple(dict.fromkeys(filter(None, found)))


def _needed_by(experiment: Experiment, teacher: str) -> tuple[str, ...]:
    """The arms that a teacher, which may be one of them, is made of."""
    if teacher in experiment.teachers:
        return experiment.teachers[teacher].needs
    return (teacher,)


def parse_bits(
    bits: str, where: str = "bits", rules: Iterable[str] = ()
) -> tuple[int | None, int | None]:
    """`"W4A8"` -> (4, 8), `"W4"` -> (4, None), `"A8"` -> (None, 8), `""` -> (None, None).

    Raises ConfigError for anything else; it names `rules`, which would have been valid too.
    """
    found = re.fullmatch(BITS, bits)
    if not found:
        names = "".join(f", {name!r}" for name in rules)
        raise ConfigError(
            f"{where}={bits!r}: expected 'W4A4', 'W4', 'A8' or '' with bits from 1 to 8{names}"
        )
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
