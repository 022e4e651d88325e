"""Differences between a config and the one that a workdir was last run with."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdq import config as kdq_config
from kdq import files
from kdq.config import Experiment

SHOWN = 3  # differences that are told
# Fields of the config that decide where it runs, and no number.
PLACES = ("seeds", "seeds_at_once", "workers", "mesh", "resources", "export", "checkpoint_seconds")


def between(path: Path, experiment: Experiment) -> str:
    """Returns what `experiment` has otherwise than the config in a file; "" if that is nothing.

    Arms, models and the like that only one of them has are no difference.

    Args:
      path: the config.json of a workdir.
      experiment: what it is to hold now.
    """
    try:
        before = kdq_config.freeze(files.read_json(path))
    except (OSError, ValueError, files.DamagedError):  # ConfigError, too: of another version
        return ""
    there, here = (_leaves(kdq_config.to_json(_without_places(e))) for e in (before, experiment))
    changed = [key for key in there if key in here and there[key] != here[key]]
    said = [f"{key} was {there[key]!r}, is {here[key]!r}" for key in changed[:SHOWN]]
    more = len(changed) - len(said)
    return ", ".join([*said, *([f"and {more} more"] if more else [])])


def _without_places(experiment: Experiment) -> Experiment:
    default = {f.name: f.default for f in dataclasses.fields(Experiment) if f.name in PLACES}
    data = dataclasses.replace(experiment.data, data_dir="")
    return dataclasses.replace(experiment, **{**default, "seeds": (), "data": data})


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """{"arms.kd.epochs": 4.0, ...}"""
    if not isinstance(value, Mapping):
        return {path: value}
    leaves = {}
    for key, inner in value.items():
        leaves |= _leaves(inner, f"{path}.{key}" if path else key)
    return leaves
