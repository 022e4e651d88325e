"""The runs of a sweep: read from its file, and all checked before any starts."""

import dataclasses
import os
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from kdq import config as kdq_config
from kdq import trust
from kdq.config import ConfigError, Experiment
from kdq.experiment import plan
from kdq.sweep.job import Job

SHARED = "shared"  # folder of a sweep by which its runs share arms
LONGEST = 200  # characters of a name; file systems allow 255
RESOURCES = "resources."  # overrides that are for the executor alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment of a sweep, in a folder of its own."""

    name: str  # of its folder
    label: str  # of its rows in the table: the name without the seeds
    overrides: Mapping[str, Any]
    experiment: Experiment
    digest: str  # of the experiment without its seeds
    folder: Path
    arm: str  # the only one that is run, with those it needs; "" is all
    job: Job

    @property
    def arms(self) -> list[str]:
        """Those that are run, in the order of the table."""
        experiment = self.experiment
        if not self.arm:
            return list(experiment.arms)
        needed = kdq_config.ancestors(experiment, experiment.teacher, self.arm)
        return [name for name in experiment.arms if name in needed]


def read(path: str) -> list[Mapping[str, Any]]:
    """Returns all that `get_sweep` of a file yields; after ":" in the path comes its argument.

    Raises ConfigError if there is no such file or function, or if it yields something else.
    """
    file, *argument = path.split(":", 1)
    if not Path(file).is_file():
        neighbours = sorted(map(str, Path(file).parent.glob("*.py")))
        raise ConfigError(kdq_config.unknown("sweep file", file, neighbours))
    module = runpy.run_path(file)
    if "get_sweep" not in module:
        raise ConfigError(f"{file}: it has no function get_sweep, which yields overrides")
    yielded = list(module["get_sweep"](*argument))
    for i, overrides in enumerate(yielded):
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"{file}: run {i} is {overrides!r}: expected a dict of overrides")
    if not yielded:
        raise ConfigError(f"{file}: get_sweep yields nothing")
    return yielded


def plan_runs(
    config: str,
    sweep: Sequence[Mapping[str, Any]],
    workdir: Path,
    *,
    launch: Path,
    shared: Mapping[str, Any] | None = None,
    arm: str = "",
) -> list[Run]:
    """Every run of a sweep, checked as if it were started.

    Args:
      config: the value of --config.
      sweep: overrides of each run, by dotted path; "name" names it.
      workdir: of the sweep.
      launch: the folder of the entry points.
      shared: overrides of all runs, which a run's own go before.
      arm: see Run.

    Raises ConfigError for an override of something that is not there or can't be, two runs of one
    name, two with the same seed of the same experiment.
    """
    runs: dict[str, Run] = {}
    for changes in sweep:
        # NumPy's numbers as Python's, of which a flag can be made.
        overrides = {
            str(path): value.item() if isinstance(value, np.generic) else value
            for path, value in changes.items()
        }
        name = overrides.pop("name", "")
        both = {**(shared or {}), **overrides}
        decides = {
            path: value for path, value in overrides.items() if not path.startswith(RESOURCES)
        }
        folder = run_folder(decides, name)
        try:
            run = _run(config, both, workdir / "runs" / folder, launch, arm)
        except ConfigError as error:
            raise ConfigError(f"run {folder}: {error}") from error
        if folder in runs:
            raise ConfigError(
                f"two runs are called {folder!r}, {dict(runs[folder].overrides)} and {overrides}: "
                'expected different ones, or a "name" in each'
            )
        runs[folder] = dataclasses.replace(run, label=run_label(decides, name), overrides=overrides)
    taken: dict[tuple[str, int], str] = {}
    for run in runs.values():
        for seed in run.experiment.seeds:
            other = taken.setdefault((run.digest, seed), run.name)
            if other != run.name:
                raise ConfigError(f"runs {other} and {run.name} are the same with seed {seed}")
    return list(runs.values())


def _run(config: str, overrides: Mapping[str, Any], folder: Path, launch: Path, arm: str) -> Run:
    passed = [
        f"--config.{path}={value if isinstance(value, str) else repr(value)}"
        for path, value in overrides.items()
        if not path.startswith(RESOURCES)
    ]
    checked = _parsed(config, overrides, passed)
    experiment = kdq_config.freeze(checked)
    if not experiment.workers:
        passed.append("--config.workers=1")  # it is the sweep that has several processes
    if arm and arm not in experiment.arms:
        raise ConfigError(kdq_config.unknown("arm", arm, experiment.arms))
    script = launch / ("train.py" if arm else "compress.py")
    command = [sys.executable, str(script), f"--config={config}", *passed]
    workdir = folder.absolute()
    command += [f"--workdir={workdir}", f"--shared={workdir.parents[1] / SHARED}"]
    command += [f"--arm={arm}"] if arm else []
    command += [f"--allow_models={module}" for module in trust.allowed()]
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Runs of one sweep compile much the same.
        command.append(f"--compilation_cache_dir={workdir.parents[1] / 'compiled'}")
    job = Job(
        name=folder.name,
        command=tuple(command),
        folder=Path.cwd(),
        log=folder.absolute() / "log.txt",
        resources=experiment.resources,
    )
    return Run(
        name=folder.name,
        label="",
        overrides=overrides,
        experiment=experiment,
        digest=plan.experiment_digest(experiment),
        folder=folder,
        arm=arm,
        job=job,
    )


def _parsed(config: str, overrides: Mapping[str, Any], passed: Sequence[str]) -> dict[str, Any]:
    """The config as the run itself will read it from its flags, with its resources."""
    plain = _from_flags(config, [])
    plain.unlock()
    plain.resources = {**kdq_config.resources(), **plain.get("resources", {})}
    for path, value in overrides.items():
        place, key = kdq_config.at_path(plain, path), f"config.{path}"
        if isinstance(value, Mapping) or isinstance(place, ConfigDict):
            raise ConfigError(f"{key}={value!r}: expected its fields one by one, as {key}.FIELD")
    parsed = _from_flags(config, passed).to_dict()
    resources = {
        p.removeprefix(RESOURCES): v for p, v in overrides.items() if p.startswith(RESOURCES)
    }
    return {**parsed, "resources": {**plain.resources.to_dict(), **resources}}


def _from_flags(config: str, passed: Sequence[str]) -> ConfigDict:
    """By the parsers that read the flags of the run itself."""
    file, *argument = config.split(":", 1)
    argv, values = ["sweep", *passed], flags.FlagValues()
    fresh = runpy.run_path(file)["get_config"](*argument)
    config_flags.DEFINE_config_dict("config", fresh, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    return values["config"].value


def run_label(overrides: Mapping[str, Any], name: str = "") -> str:
    """`{"distill.kd.terms.kl.temperature": 4.0, "seeds": (3,)}` -> "temperature=4.0".

    Runs of one label differ in nothing but their seeds. Without overrides it is "base"; a name says
    it better than the overrides do. Raises ConfigError for one that is no folder's, or too long.
    """
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+=,.\-]*", name):
        raise ConfigError(
            f"run name {name!r} is a folder: expected letters, digits, _ + = , . - and a letter or "
            "digit first"
        )
    said = [_said(path, value) for path, value in overrides.items() if path != "seeds"]
    return _checked(name or ",".join(said) or "base")


def run_folder(overrides: Mapping[str, Any], name: str = "") -> str:
    """The label with the seeds: "temperature=4.0,seeds=3"."""
    seeds = [_said("seeds", overrides["seeds"])] if "seeds" in overrides else []
    return _checked(",".join([run_label(overrides, name), *seeds]))


def _said(path: str, value: Any) -> str:
    values = value if isinstance(value, tuple | list) else [value]
    text = "-".join(map(str, values))
    return re.sub(r"[^A-Za-z0-9_+=.\-]+", "-", f"{path.rpartition('.')[2]}={text}")


def _checked(name: str) -> str:
    if len(name) > LONGEST:
        raise ConfigError(f'run name {name!r} is too long: expected a "name" beside the overrides')
    return name
