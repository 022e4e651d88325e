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

from kdq.fields import ConfigError, build, check_needs, check_references, did_you_mean, unknown
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
    "at_path",
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
    """Returns a config with fields that it leaves out at their defaults, for flags to set."""
    for field in dataclasses.fields(Experiment):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            config[field.name] = {**dataclasses.asdict(default), **config.get(field.name, {})}
        elif default is not dataclasses.MISSING and field.name not in config:
            config[field.name] = default
    return config


def at_path(config: ml_collections.ConfigDict, path: str) -> Any:
    """Returns what a config has at a dotted path. Raises ConfigError for a key that it lacks."""
    place, seen = config, "config"
    for key in path.split("."):
        if not hasattr(place, "keys") or key not in place:
            raise ConfigError(unknown(f"key in {seen}:", key, getattr(place, "keys", list)()))
        place, seen = place[key], f"{seen}.{key}"
    return place


def freeze(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """The checked, frozen form of a config.

    Raises:
      ConfigError: an unknown or missing key, a value of the wrong type, an arm that names an arm or
        model that is not there or that depends on itself.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    experiment = build(Experiment, config, "config")
    teachers = {}
    for name, entry in experiment.teachers.items():
        where = f"config.teachers.{name}"
        kind = entry.get("kind") if isinstance(entry, Mapping) else entry
        if kind not in TEACHERS:
            raise ConfigError(unknown(f"{where}.kind:", kind, TEACHERS))
        teachers[name] = build(TEACHERS[kind], entry, where)
    models, compute = dict(experiment.models), experiment.compute
    if compute.dtype:
        models = {name: {**fields, "dtype": compute.dtype} for name, fields in models.items()}
        compute = dataclasses.replace(compute, dtype="")
    experiment = dataclasses.replace(experiment, teachers=teachers, models=models, compute=compute)
    check_references(experiment, experiment, "config")
    _check(experiment)
    return experiment


def _check(experiment: Experiment) -> None:
    """Raises ConfigError for fields that do not fit each other; each by itself `build` has seen."""
    if not isinstance(experiment.task.get("name"), str):
        raise ConfigError("config.task.name is missing: a module of kdq.tasks")
    for name, model in experiment.models.items():
        if "name" not in model:
            raise ConfigError(f"config.models.{name}.name is missing: a module of kdq.models")
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
    cache = experiment.cache
    if (cache.kind in ("top_k", "sampled")) != (cache.size > 0):
        raise ConfigError(
            f"config.cache: size={cache.size} with kind={cache.kind!r}; expected at least 1 with "
            "'top_k' and 'sampled', 0 with the others"
        )
    for name in experiment.teachers:
        _check_teacher(experiment, name)
    for name in experiment.arms:
        _check_arm(experiment, name)
    ancestors(experiment, *experiment.arms)  # whose parents are all there


def _check_search(experiment: Experiment, search: Search, where: str) -> None:
    if not search.students:
        raise ConfigError(f"{where}.students is empty: expected a float arm or more")
    for field in ("students", "teacher"):
        value = getattr(search, field)
        for arm in value if field == "students" else filter(None, (value,)):
            if experiment.arms[arm].bits:
                raise ConfigError(f"{where}.{field}: {arm!r} is quantized; expected a float arm")
    if not search.teacher:
        raise ConfigError(f"{where}.teacher is missing: the arm that policies are compared with")
    for i, bits in enumerate(search.choices):
        parse_bits(bits, f"{where}.choices[{i}]")
    for pattern, bits in search.fixed.items():
        parse_bits(bits, f"{where}.fixed[{pattern!r}]")
    if not search.most.set and not search.share.set:
        raise ConfigError(
            f"{where}: no budget; expected `most` or `share`, e.g. most.average_bits=3"
        )
    if both := search.most.set.keys() & search.share.set.keys():
        raise ConfigError(f"{where}: expected `most` or `share` of {sorted(both)}, not both")
    if search.steps and not search.finetune:
        raise ConfigError(f"{where}.steps={search.steps}: needs `finetune`, the arm to train as")
    if search.distilled and not search.steps:
        raise ConfigError(
            f"{where}.distilled={search.distilled}: only a finetune tells, expected steps"
        )
    if search.distilled:
        recipe = experiment.arms[search.finetune].distill
        terms = experiment.distill[recipe].terms if recipe in experiment.distill else ()
        for term in search.distilled:
            if term not in terms:
                raise ConfigError(unknown(f"{where}.distilled: term", term, terms))


def _check_teacher(experiment: Experiment, name: str) -> None:
    where, teacher = f"config.teachers.{name}", experiment.teachers[name]
    if name in experiment.arms:
        raise ConfigError(
            f"{where}: there is an arm of that name; an arm's teacher names one of them"
        )
    if teacher.kind == "ensemble" and teacher.weights and len(teacher.weights) != len(teacher.arms):
        raise ConfigError(
            f"{where}.weights={teacher.weights}: expected {len(teacher.arms)} numbers, or none"
        )
    if teacher.kind == "peer" and teacher.init:
        start = experiment.arms[teacher.init]
        if start.model != teacher.model or start.bits:
            raise ConfigError(
                f"{where}.init={teacher.init!r} is a {start.bits or 'float'} {start.model!r}: "
                f"expected a float {teacher.model!r}"
            )
    if teacher.kind == "former_peer" and not peer_of(experiment, teacher.arm):
        raise ConfigError(f"{where}.arm={teacher.arm!r}: it is not taught by a peer")


def peer_of(experiment: Experiment, name: str) -> Peer | None:
    """The peer that teaches the arm `name`, if one does."""
    teacher = experiment.teachers.get(experiment.arms[name].teacher)
    return teacher if isinstance(teacher, Peer) else None


def _check_arm(experiment: Experiment, name: str) -> None:
    where, arm = f"config.arms.{name}", experiment.arms[name]
    if arm.reference == name:
        raise ConfigError(f"{where}.reference={name!r}: expected another arm, or none")
    if arm.init and experiment.arms[arm.init].model != arm.model:
        raise ConfigError(
            f"{where}.init={arm.init!r} is a {experiment.arms[arm.init].model!r}, "
            f"but the arm is a {arm.model!r}: expected an arm of the same model"
        )
    if arm.init and experiment.arms[arm.init].bits and not arm.bits:
        raise ConfigError(f"{where}.init={arm.init!r} is quantized, but the arm is float")
    if arm.bits in experiment.searches and arm.init not in experiment.searches[arm.bits].students:
        students = experiment.searches[arm.bits].students
        raise ConfigError(
            f"{where}.init={arm.init!r}: expected a student of its search, of {students}"
        )
    if arm.bits not in (*experiment.rules, *experiment.searches):
        valid = (*experiment.rules, *experiment.searches)
        parse_bits(arm.bits, where=f"{where}.bits", rules=valid)
    if arm.init and arm.load:
        raise ConfigError(f"{where}: init={arm.init!r} and load={arm.load!r}; expected one of them")
    if not (arm.epochs or arm.init or arm.load):
        raise ConfigError(
            f"{where}.epochs={arm.epochs}: expected more than 0, or an init or load to keep"
        )
    if arm.stop > arm.epochs:
        raise ConfigError(f"{where}.stop={arm.stop}: expected 0 to the {arm.epochs} epochs")
    for seed in experiment.seeds:
        if not 0 <= seed + arm.seed_offset < SEEDS:
            raise ConfigError(
                f"{where}.seed_offset={arm.seed_offset}: with the seed {seed} that is "
                f"{seed + arm.seed_offset}; expected 0 to below {SEEDS}"
            )
    guided = arm.ptq and not arm.epochs and arm.teacher in experiment.arms
    if bool(arm.teacher) != bool(arm.distill) and not guided:
        raise ConfigError(
            f"{where}: teacher={arm.teacher!r} with distill={arm.distill!r}; expected both or "
            "neither"
        )
    check_needs(arm, where)


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
                if len(circle) > 400:
                    circle = f"{circle[:200]} ... {circle[-200:]}"
                raise ConfigError(f"arms need each other in a circle: {circle}")
            else:
                trail[parent] = iter(parents(experiment, parent))
    return tuple(order)


def parents(experiment: Experiment, name: str) -> tuple[str, ...]:
    """The arms that `name` starts from, is taught by, or whose search needs them."""
    arm = experiment.arms[name]
    names = [arm.init, *_needed_by(experiment, arm.teacher)]
    if arm.bits in experiment.searches:
        search = experiment.searches[arm.bits]
        names += [*search.students, search.teacher]
        if search.steps:
            names += _needed_by(experiment, experiment.arms[search.finetune].teacher)
    return tuple(dict.fromkeys(filter(None, names)))


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
    match = re.fullmatch(BITS, bits)
    if not match:
        names = "".join(f", {name!r}" for name in rules)
        raise ConfigError(
            f"{where}={bits!r}: expected 'W4A4', 'W4', 'A8' or '' with bits from 1 to 8{names}"
        )
    weights, activations = match.groups()
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
