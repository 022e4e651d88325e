"""What finished arms left in the workdir: records and weights."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kdq import config as kdq_config
from kdq import deploy, files
from kdq.config import ConfigError, Experiment
from kdq.experiment import plan
from kdq.experiment.progress import Record
from kdq.train.checkpoint import Checkpointer
from kdq.types import Variables

CONFIG, PACKED = "config.json", "model.safetensors"  # of an experiment, and of an arm and seed


def load(path: str) -> deploy.PackedModel:
    """A packed file that the config names. Raises ConfigError for one that can't be read."""
    try:
        return deploy.load_packed(path)
    except deploy.PackedFileError as error:
        raise ConfigError(f"a packed file of the config: {error}") from error


class Store:
    """`WORKDIR/ARM/SEED` of every arm and seed."""

    def __init__(self, experiment: Experiment, workdir: Path):
        self._experiment, self.workdir = experiment, workdir
        self.digests = plan.digests(experiment)
        # Arms of one seed run one after another, so few of these are in use at once.
        self.weights = functools.lru_cache(maxsize=8)(self._load_weights)

    def folder(self, name: str, seed: int) -> Path:
        return self.workdir / name / str(seed)

    def finished(self, name: str, seed: int) -> Record | None:
        """The record of an arm that has been run before.

        Raises ConfigError if it was run with another config.
        """
        path = self.folder(name, seed) / "result.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        if record["arm_digest"] != self.digests[name]:
            raise ConfigError(
                f"{path} was made with another config (digest {record['arm_digest']}, now "
                f"{self.digests[name]}): choose another workdir, or delete {path.parent}"
            )
        return {**record, "reference": self._experiment.arms[name].reference or None}

    def save_config(self) -> None:
        """What is run here, for those who look at it later."""
        path = self.workdir / CONFIG
        text = json.dumps(kdq_config.to_json(self._experiment), indent=1) + "\n"
        if not path.is_file() or path.read_text() != text:
            files.write_atomic(path, text.encode())

    def record(self, name: str, seed: int) -> Record:
        return json.loads((self.folder(name, seed) / "result.json").read_text())

    def save(self, record: Record) -> None:
        path = self.folder(record["arm"], record["seed"]) / "result.json"
        text = json.dumps(record, indent=1, allow_nan=False)
        files.write_atomic(path, f"{text}\n".encode())

    def _load_weights(self, name: str, seed: int) -> Variables:
        """The selected variables of an arm: what was trained, before any rounding."""
        arms = self._experiment.arms
        while (
            not arms[name].epochs and arms[name].init
        ):  # a chain may be longer than Python's stack
            name = arms[name].init
        if arms[name].epochs:
            return _variables(self._selected(name, seed))
        return load(arms[name].load).variables

    def peer_weights(self, name: str, seed: int) -> Variables:
        """The variables of the peer that taught an arm, at the step that the arm selected."""
        return _variables(self._selected(name, seed)["peer"])

    def _selected(self, name: str, seed: int) -> dict[str, Any]:
        folder = self.folder(name, seed) / "checkpoints"
        with Checkpointer(folder, alone=True) as checkpointer:
            found = checkpointer.restore({"selected": None})
        if found is None:
            raise FileNotFoundError(
                f"{folder} holds no checkpoint that can be read, but {folder.parent} has a result: "
                "delete that folder to train the arm again"
            )
        return found[1]["selected"]


def _variables(parts: dict[str, Any]) -> Variables:
    return jax.tree.map(jnp.asarray, {"params": parts["params"], **parts["model_state"]})
