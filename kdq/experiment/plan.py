"""Which arms run, in which order, and what makes a finished one valid."""

import dataclasses
from collections.abc import Iterable

from kdq import config as kdq_config
from kdq.config import Experiment


def in_order(experiment: Experiment, names: Iterable[str]) -> list[str]:
    """`names` and what they need, each after what it needs."""
    order: dict[str, None] = {}
    for name in names:
        order |= dict.fromkeys(kdq_config.ancestors(experiment, name))
    return list(order)


def digests(experiment: Experiment) -> dict[str, str]:
    """A digest for each arm of all that decides its numbers: its own config, and its ancestors'."""
    shared = {
        "data": dataclasses.replace(experiment.data, data_dir=""),
        "optimizer": experiment.optimizer,
        "evaluations": experiment.evaluations,
        "cache_teacher": experiment.cache_teacher,
    }
    found: dict[str, str] = {}
    for name in in_order(experiment, experiment.arms):
        arm = experiment.arms[name]
        parents = {k: found.get(getattr(arm, k), "") for k in ("init", "teacher")}
        # The fidelity of every arm but the teacher's own ancestors is measured against the teacher.
        parents["measured_against"] = found.get(experiment.teacher, "")
        found[name] = kdq_config.digest(
            {
                **shared,
                "quantize": experiment.quantize if arm.bits else None,
                "model": experiment.models[arm.model],
                "arm": {**kdq_config.to_json(arm), "reference": "", **parents},
            }
        )
    return found


def experiment_digest(experiment: Experiment) -> str:
    """A digest of the whole config but the seeds and the folder of the data."""
    place = {"seeds": (), "data": dataclasses.replace(experiment.data, data_dir="")}
    return kdq_config.digest(dataclasses.replace(experiment, **place))
