"""Arms in the forms that runtimes take, measured there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdq import config as kdq_config
from kdq import deploy, files, lock, models, trust
from kdq.config import ConfigError, Experiment
from kdq.deploy.measure import latency
from kdq.experiment.inputs import Inputs
from kdq.experiment.store import CONFIG, PACKED

FOLDER = "export"


def export(
    path: Path, folder: Path, formats: Sequence[str], inputs: Inputs, config: kdq_config.Export
) -> tuple[dict[str, Any], dict[str, str]]:
    """Exports a packed file; what the record says of each file that there is of it, by format.

    That is its part of the manifest, and whether it is the recommended one, if they are timed; of
    these formats also "accuracy": on the whole test split, in their own runtimes.

    Returns:
      The files, and why those of other formats are not there.
    """
    images = inputs.examples("validation", "image", config.examples)
    with lock.hold(folder, alone=True):
        try:
            manifest = deploy.export(
                path,
                folder,
                formats,
                images,
                agreement=config.agreement,
                latency_batches=config.latency_batches,
                threads=config.threads or None,
            )
        except deploy.ExportError as error:
            if error.manifest is None:
                raise
            manifest = error.manifest
    test, labels = (inputs.examples("test", key) for key in ("image", "label"))
    found = {name: dict(entry) for name, entry in manifest["files"].items()}
    if config.latency_batches:
        for name, entry in found.items():
            entry["recommended"] = manifest["recommended"] == name
    for name in [name for name in formats if name in found]:
        run = deploy.FORMATS[name].load(folder / found[name]["file"], None, None)
        parts = np.split(test, range(500, len(test), 500))
        accuracy = (np.concatenate([run(part) for part in parts]).argmax(-1) == labels).mean()
        found[name]["accuracy"] = float(accuracy)
    return found, manifest["failed"]


def of_workdir(
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
    experiment = _read(Path(workdir))
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
    seeds, inputs, found = seeds or sorted(packed), Inputs(experiment), {}
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
        found[seed] = {name: (files_there | reasons)[name] for name in formats}
    return found


def raise_failures(failures: Mapping[str, str]) -> None:
    """Raises ExportError if anything failed: all of it in a line.

    Args:
      failures: reasons, by what was to be exported.
    """
    if failures:
        raise deploy.ExportError("; ".join(f"{what}: {why}" for what, why in failures.items()))


def _read(workdir: Path) -> Experiment:
    path = workdir / CONFIG
    try:
        config = files.read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{workdir} holds no experiment: no {path}") from None
    try:
        return kdq_config.freeze(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def check(formats: Sequence[str], where: str) -> None:
    """Raises ConfigError for a format that there is not, or whose libraries are not there."""
    try:
        deploy.check_formats(formats)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_config(config: kdq_config.Export) -> None:
    """Raises ConfigError for a section that can't be done here."""
    check(config.formats, "config.export.formats")
    if config.latency_batches:  # beside the float model in ONNX Runtime
        check(("onnx",), "config.export.latency_batches")
    try:
        latency.cores(config.threads or None)
    except ValueError as error:
        raise ConfigError(f"config.export.{error}") from error
