"""Which arms run, in which order, and what makes a finished one valid."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from kdq import config as kdq_config
from kdq import models
from kdq.config import ConfigError, Data, Experiment
from kdq.schema import CLASSIFICATION

UNIFORM = "uniform"  # the method of searches that others are compared with


def digests(experiment: Experiment) -> dict[str, str]:
    """A digest for each arm of all that decides its numbers: its own config, and its ancestors'.

    Raises ConfigError for a packed file that is not there.
    """
    shared = {
        "data": _data(experiment.data),
        "optimizer": experiment.optimizer,
        "evaluations": experiment.evaluations,
        "transfer": experiment.transfer,
        **_unless_default("compute", experiment.compute),
        **_task(experiment),
    }
    digests_of_arms: dict[str, str] = {}
    for name in kdq_config.ancestors(experiment, *experiment.arms):
        arm = experiment.arms[name]
        others = {
            "init": digests_of_arms.get(arm.init, ""),
            "teacher": _taught_by(experiment, name, digests_of_arms) if arm.teacher else "",
            "distill": experiment.distill[arm.distill] if arm.distill else "",
            "load": _file(arm.load, f"config.arms.{name}.load") if arm.load else "",
            # Fidelity of every arm but the teacher's own ancestors is measured against the teacher.
            "measured_against": digests_of_arms.get(experiment.teacher, ""),
        }
        further = {}
        if arm.bits in experiment.searches:
            further["search"] = search_digest(experiment, arm.bits, digests_of_arms)
        model = experiment.models[arm.model]
        if models.is_own(model["name"]):  # it can change with no commit of kdq's to tell
            further["source"] = models.source_digest(model["name"])
        digests_of_arms[name] = kdq_config.digest(
            {
                **shared,
                "quantize": experiment.quantize if arm.bits else None,
                "ptq": experiment.ptq[arm.ptq] if arm.ptq else None,
                **({"rules": experiment.rules[arm.bits]} if arm.bits in experiment.rules else {}),
                **further,
                "qat": experiment.qat[arm.qat] if arm.qat else None,
                "model": model,
                "arm": {**kdq_config.to_json(arm), "reference": "", **kdq_config.to_json(others)},
            }
        )
    return digests_of_arms


def _data(config: Data) -> Data:
    """Without its folder; a file by its contents, which has no version that says what it is."""
    name = config.name
    if name.endswith(".npz"):
        name = _file(str(Path(config.data_dir, name)), "config.data.name")
    return dataclasses.replace(config, name=name, data_dir="")


def search_digest(experiment: Experiment, name: str, digests_of_arms: dict[str, str]) -> str:
    """A digest of all that decides what a search finds; `digests_of_arms` are those of arms."""
    search = experiment.searches[name]
    finetune = experiment.arms[search.finetune] if search.steps else None
    return kdq_config.digest(
        {
            "search": dataclasses.replace(search, finetune="", other_device=False, cost_tables=()),
            "cost_tables": [
                _file(path, f"config.searches.{name}.cost_tables") for path in search.cost_tables
            ],
            "students": [digests_of_arms[student] for student in search.students],
            "teacher": digests_of_arms[search.teacher],
            "calibration": experiment.quantize.calibration_examples,
            "finetune": finetune
            and [
                finetune,
                experiment.distill.get(finetune.distill),
                experiment.qat.get(finetune.qat),
                experiment.quantize,
                finetune.teacher and _taught_by(experiment, search.finetune, digests_of_arms),
            ],
        }
    )


def baseline_of(experiment: Experiment, name: str) -> str:
    """Returns the uniform search that arms of the search `name` are compared with, or ""."""
    references = [arm.reference for arm in experiment.arms.values() if arm.bits == name]
    searches = [experiment.arms[arm].bits for arm in references if arm]
    uniform = [
        other
        for other in searches
        if other in experiment.searches and experiment.searches[other].method == UNIFORM
    ]
    return next((other for other in uniform if other != name), "")


def _taught_by(experiment: Experiment, name: str, digests_of_arms: dict[str, str]) -> Any:
    teacher = experiment.arms[name].teacher
    if teacher in experiment.arms:
        return {"arm": digests_of_arms[teacher], "cache": experiment.cache}
    config = experiment.teachers[teacher]
    parts = {"config": config, "arms": [digests_of_arms[arm] for arm in config.needs]}
    if config.kind == "packed":
        parts["file"] = _file(config.path, f"config.teachers.{teacher}.path")
        parts["config"] = config.kind  # the same file elsewhere is the same teacher
    if config.kind == "peer":
        parts["model"] = experiment.models[config.model]
    return parts


def _file(path: str, where: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{where}={path!r} can't be read: {error.strerror}") from error


def experiment_digest(experiment: Experiment) -> str:
    """A digest of the whole config but the seeds, where it runs, and what is said of it."""
    parts = kdq_config.to_json(
        dataclasses.replace(experiment, seeds=(), data=_data(experiment.data))
    )
    # `quick` is said of numbers, and decides none.
    for name in ("mesh", "resources", "compute", "seeds_at_once", "workers", "quick", "task"):
        del parts[name]
    if not experiment.export.fixed_point:  # as it was before there was such a field
        del parts["export"]["fixed_point"]
    new = {**_unless_default("compute", experiment.compute), **_task(experiment)}
    return kdq_config.digest({**parts, **new})


def _task(experiment: Experiment) -> dict[str, Any]:
    """For a digest: the task, unless it is the one that all configs had before there were others"""
    is_default = experiment.task == {"name": CLASSIFICATION}
    return {} if is_default else {"task": experiment.task}


def _unless_default(name: str, value: Any) -> dict[str, Any]:
    """For a digest that is to be what it was before there was such a field."""
    return {} if value == type(value)() else {name: value}
