"""Arms in the forms that runtimes take, measured there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdq import config as kdq_config
from kdq import deploy
from kdq.config import ConfigError, Experiment
from kdq.experiment.inputs import Inputs
from kdq.experiment.store import CONFIG, Store

FOLDER = "export"


def export(
    path: Path, folder: Path, formats: Sequence[str], inputs: Inputs, config: kdq_config.Export
) -> dict[str, Any]:
    """Exports a packed file; what the record says of each format.

    That is its part of the manifest, with "accuracy": on the whole test split, in its own runtime.

    Raises:
      ParityError: see `deploy.export`.
    """
    images = _images(inputs, "validation")[: config.examples]
    manifest = deploy.export(path, folder, formats, images, agreement=config.agreement)
    test, labels = _images(inputs, "test"), inputs.splits["test"]
    labels = labels.read(np.arange(len(labels)))["label"]
    found = {}
    for name in formats:
        entry = manifest["files"][name]
        run, size = deploy.FORMATS[name].load(folder / entry["file"]), 500
        outputs = [run(test[start : start + size]) for start in range(0, len(test), size)]
        accuracy = (np.concatenate(outputs).argmax(-1) == labels).mean()
        found[name] = {**entry, "accuracy": float(accuracy)}
    return found


def _images(inputs: Inputs, split: str) -> np.ndarray:
    """All of a split, as a model takes them."""
    batches = inputs.batches(split)
    return np.concatenate([batch["image"][batch["mask"] > 0] for batch in batches])


def of_workdir(
    workdir: str | Path,
    arm: str,
    *,
    formats: Sequence[str],
    out: str | Path | None = None,
    seeds: Sequence[int] = (),
) -> dict[int, dict[str, Any]]:
    """Exports an arm of an experiment that has been run; returns what is found, by seed.

    Args:
      workdir: of the experiment.
      arm: its name.
      formats: keys of `deploy.FORMATS`.
      out: the folder; one a seed in it, if there are several. None: "export" beside its packed
        file.
      seeds: which; () is all that the experiment has.

    Raises:
      ConfigError: no such experiment, arm or format, or one that has not been run.
      ParityError: see `deploy.export`.
    """
    experiment = _read(Path(workdir))
    check(formats, "format")
    if arm not in experiment.arms:
        raise ConfigError(kdq_config.unknown("arm", arm, experiment.arms))
    store, inputs = Store(experiment, Path(workdir)), Inputs(experiment)
    seeds, found = seeds or experiment.seeds, {}
    for seed in seeds:
        path = store.folder(arm, seed) / "model.safetensors"
        if not path.is_file():
            raise ConfigError(f"arm {arm!r}, seed {seed} has not been run: no {path}")
    for seed in seeds:
        path = store.folder(arm, seed) / "model.safetensors"
        folder = path.parent / FOLDER
        if out is not None:
            folder = Path(out) / str(seed) if len(seeds) > 1 else Path(out)
        found[seed] = export(path, folder, formats, inputs, experiment.export)
    return found


def _read(workdir: Path) -> Experiment:
    path = workdir / CONFIG
    try:
        return kdq_config.freeze(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{workdir} holds no experiment: no {path}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def check(formats: Sequence[str], where: str) -> None:
    """Raises ConfigError for a format that there is not, or whose libraries are not there."""
    try:
        deploy.check_formats(formats)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
