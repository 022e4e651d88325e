"""Arms in the forms that runtimes take, measured there."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdq import config as kdq_config
from kdq import deploy, lock, models, trust
from kdq.config import ConfigError
from kdq.deploy.measure import latency
from kdq.experiment.inputs import Inputs
from kdq.experiment.store import CONFIG, PACKED, read_config
from kdq.tasks import Task
from kdq.types import Array, Batch

FOLDER = "export"
PART = 500  # examples of the test split that a runtime computes at once


def export(
    path: Path,
    folder: Path,
    formats: Sequence[str],
    inputs: Inputs,
    config: kdq_config.Export,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Exports a packed file; returns what the record says of each file of it, by format, and why
    other formats failed.

    Of a file that is its part of the manifest, whether it is the recommended one, if they are
    timed, and the task's primary metric on the whole test split, in its own runtime.
    """
    task = inputs.task
    arrays = {key: inputs.examples("validation", key, config.examples) for key in task.keys}
    with lock.hold(folder, alone=True):
        try:
            manifest = deploy.export(
                path,
                folder,
                formats,
                task.inputs(arrays),
                task=task,
                fixed_point=config.fixed_point,
                agreement=config.agreement,
                latency_batches=config.latency_batches,
                threads=config.threads or None,
            )
        except deploy.ExportError as error:
            if error.manifest is None:
                raise
            manifest = error.manifest
    test = {key: inputs.examples("test", key) for key in (*task.keys, task.target)}
    entries = {name: dict(entry) for name, entry in manifest["files"].items()}
    if config.latency_batches:
        for name, entry in entries.items():
            entry["recommended"] = manifest["recommended"] == name
    for name in [name for name in formats if name in entries]:
        run = deploy.FORMATS[name].load(folder / entries[name]["file"], None, None)
        scores = []
        for first in range(0, len(test[task.target]), PART):
            part = {key: array[first : first + PART] for key, array in test.items()}
            scores.append(_primary_scores(task, run(task.inputs(part)), part))
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *scores)
        entries[name][task.primary.name] = task.primary.compute(joined)
    return entries, manifest["failed"]


@partial(jax.jit, static_argnames="task")
def _primary_scores(task: Task, outputs: Array, batch: Batch) -> dict[str, Array]:
    scores = task.scores(outputs, batch)
    return {name: scores[name] for name in task.primary.scores}


def export_arm(
    workdir: str | Path,
    arm: str,
    *,
    formats: Sequence[str],
    out: str | Path | None = None,
    seeds: Sequence[int] = (),
    allow_models: Sequence[str] = (),
) -> dict[int, dict[str, Any]]:
    """Exports an arm of an experiment that has been run; returns what is found, by seed and format.

    Of a format that failed that is "failed": why. All others are there.

    Args:
      workdir: of the experiment.
      arm: its name.
      formats: keys of `deploy.FORMATS`.
      out: the folder; one a seed in it, if there are several. None: "export" beside its packed
        file.
      seeds: which; () is all that have been run.
      allow_models: modules that may be imported if the workdir's config names models in them.

    Raises:
      ConfigError: no such experiment, arm or format, or one that has not been run.
    """
    experiment = read_config(Path(workdir))
    if experiment is None:
        raise ConfigError(f"{workdir} holds no experiment: no {Path(workdir, CONFIG)}")
    check(formats, "format")
    if arm not in experiment.arms:
        raise ConfigError(kdq_config.unknown("arm", arm, experiment.arms))
    packed = {
        int(path.parent.name): path
        for path in sorted(Path(workdir, arm).glob(f"*/{PACKED}"))
        if path.parent.name.isdigit()
    }
    model = experiment.models[experiment.arms[arm].model]
    if models.is_own(model["name"]):
        trust.check(model["name"], str(Path(workdir, CONFIG)), allow_models)
        models.build(**model)  # imports it, which reading the file does not
    seeds, inputs, exported = seeds or sorted(packed), Inputs(experiment), {}
    if not seeds or not set(seeds) <= set(packed):
        raise ConfigError(
            f"{workdir} has the seeds {sorted(packed)} of arm {arm!r}, wanted {list(seeds)}"
        )
    for seed in seeds:
        path = packed[seed]
        folder = path.parent / FOLDER
        if out is not None:
            folder = Path(out) / str(seed) if len(seeds) > 1 else Path(out)
        files_there, failed = export(path, folder, formats, inputs, experiment.export)
        reasons = {name: {"failed": reason} for name, reason in failed.items()}
        exported[seed] = {name: (files_there | reasons)[name] for name in formats}
    return exported


def raise_failures(failures: Mapping[str, str]) -> None:
    """Raises ExportError if anything failed: all reasons in a line, by what was exported."""
    if failures:
        raise deploy.ExportError("; ".join(f"{what}: {why}" for what, why in failures.items()))


def check(formats: Sequence[str], where: str) -> None:
    """Raises ConfigError for a format that there is not, or whose libraries are not there."""
    try:
        deploy.check_formats(formats)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_config(config: kdq_config.Export) -> None:
    """Raises ConfigError for a section that can't be done here."""
    check(config.formats, "config.export.formats")
    if config.fixed_point and (onnx := [name for name in config.formats if "onnx" in name]):
        raise ConfigError(
            f"config.export.fixed_point: format {onnx[0]!r} has no multipliers in fixed point; "
            "packed, litert and stablehlo have"
        )
    if config.latency_batches:  # beside the float model in ONNX Runtime
        check(("onnx",), "config.export.latency_batches")
    try:
        latency.cores(config.threads or None)
    except ValueError as error:
        raise ConfigError(f"config.export.{error}") from error
