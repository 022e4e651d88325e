"""Records and weights of finished arms in the workdir."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdq import config as kdq_config
from kdq import deploy, files, tasks
from kdq.config import ConfigError, Experiment
from kdq.experiment import differences, plan, records
from kdq.record import ArmRecord
from kdq.train.checkpoint import Checkpointer, CheckpointError
from kdq.types import Variables

CONFIG = "config.json"  # of an experiment
RESULT, PACKED = "result.json", "model.safetensors"  # of an arm and seed


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
        self._expected: dict[tuple[str, int], ArmRecord] = {}
        # Arms of one seed run one after another, so few of these are in use at once.
        self.weights = functools.lru_cache(maxsize=8)(self._load_weights)

    def folder(self, name: str, seed: int) -> Path:
        return self.workdir / name / str(seed)

    def finished(self, name: str, seed: int) -> ArmRecord | None:
        """The record of an arm that has been run before.

        Raises ConfigError if it was run with another config.
        """
        if not (self.folder(name, seed) / RESULT).exists():
            return None
        record = self.record(name, seed)
        path = self.folder(name, seed) / RESULT
        if record.arm_digest != self.digests[name]:
            changed = differences.between(self.workdir / CONFIG, self._experiment)
            changed = changed or f"digest {record.arm_digest}, now {self.digests[name]}"
            raise ConfigError(
                f"{path} was made with another config ({changed}): choose another workdir, or "
                f"delete {path.parent}"
            )
        records.check_packed(record, path.parent / PACKED)
        return dataclasses.replace(record, reference=self._experiment.arms[name].reference)

    def save_config(self) -> None:
        """Writes the config that is run here, for those who look at it later."""
        path = self.workdir / CONFIG
        text = files.json_text(kdq_config.to_json(self._experiment))
        if not path.is_file() or path.read_bytes() != text.encode():
            files.write_atomic(path, text.encode())

    def record(self, name: str, seed: int) -> ArmRecord:
        """Returns the record of an arm and seed. Raises ConfigError for a file that is none."""
        path = self.folder(name, seed) / RESULT
        try:
            record = ArmRecord.from_json(files.read_json(path))
            if (record.arm, record.seed) != (name, seed):
                raise ConfigError(f"it is of arm {record.arm!r}, seed {record.seed}")
            record.require("kind", "bits", "arm_digest")
            if record.status == "ok":
                record.require(tasks.build(record.task).primary.name)
        except ConfigError as error:
            where = "" if str(path) in str(error) else f"{path} is no record of this arm: "
            again = "delete it, and the same command makes it again from the arm's checkpoint"
            raise ConfigError(f"{where}{error} ({again})") from error
        return record

    def save(self, record: ArmRecord) -> None:
        files.write_json(self.folder(record.arm, record.seed) / RESULT, record.to_json())

    def expect(self, record: ArmRecord) -> None:
        """Takes the digests of what an arm has selected whose record is not saved yet."""
        self._expected[record.arm, record.seed] = record

    def _load_weights(self, name: str, seed: int) -> Variables:
        """The selected variables of an arm: what was trained, before any rounding."""
        arms = self._experiment.arms
        # A chain of arms that only quantize may be longer than Python's stack.
        while not arms[name].epochs and arms[name].init:
            name = arms[name].init
        if arms[name].epochs:
            return self._selected(name, seed)["weights"]
        return load(arms[name].load).variables

    def peer_weights(self, name: str, seed: int) -> Variables:
        """The variables of the peer that taught an arm, at the step that the arm selected."""
        return self._selected(name, seed)["peer"]

    def _selected(self, name: str, seed: int) -> dict[str, Variables]:
        """Returns the networks that an arm's record is about: "weights", and "peer" if it has one.

        Raises CheckpointError if no checkpoint has it.
        """
        folder = self.folder(name, seed)
        record = self._expected.get((name, seed)) or self.record(name, seed)
        with Checkpointer(folder / "checkpoints", alone=True) as checkpointer:
            for step in reversed(checkpointer.steps()):
                parts = checkpointer.read(step, {"selected": None})
                if parts is None:
                    continue
                networks = _by_name(parts[0]["selected"]).items()
                trees = {network: records.variables_of(part) for network, part in networks}
                if records.is_about(record, trees, parts[1]["selected"]["step"]):
                    return trees
        raise CheckpointError(
            f"{folder / 'checkpoints'} has no checkpoint with the weights that "
            f"{folder / RESULT} is about: delete {folder} to train the arm again"
        )


def _by_name(parts: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the networks of what training selected: "weights", and "peer" if there is one."""
    return {"weights": parts, **({"peer": parts["peer"]} if "peer" in parts else {})}
