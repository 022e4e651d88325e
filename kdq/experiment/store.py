"""Records and weights of the arms in a workdir, and the weights that arms start from."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import config as kdq_config
from kdq import deploy, files, tasks
from kdq.config import ConfigError, Experiment
from kdq.distill.cache_key import digest_variables
from kdq.experiment import plan
from kdq.quantize.inputs import unboxed
from kdq.quantize.network import as_network
from kdq.record import ArmRecord
from kdq.train.checkpoint import Checkpointer, CheckpointError
from kdq.train.loop import Selection
from kdq.types import Array, Variables

CONFIG = "config.json"  # of an experiment
RESULT, PACKED = "result.json", "model.safetensors"  # of an arm and seed
SHOWN = 3  # differences between configs that are told
# Fields of the config that decide where it runs, and no number.
PLACES = ("seeds_at_once", "workers", "mesh", "resources", "export", "checkpoint_seconds")


def load(path: str) -> deploy.PackedModel:
    """A packed file that the config names. Raises ConfigError for one that can't be read."""
    try:
        return deploy.load_packed(path)
    except deploy.PackedFileError as error:
        raise ConfigError(f"a packed file of the config: {error}") from error


def read_config(workdir: Path) -> Experiment | None:
    """Returns what was run last in a workdir, None if nothing was.

    Raises ConfigError if that can't be read, or is of another version.
    """
    path = workdir / CONFIG
    if not path.exists():
        return None
    document = files.read_json(path)
    try:
        return kdq_config.freeze(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


# Runs once, but full optimization of the samplers takes ten times as long to compile.
@functools.partial(
    jax.jit,
    static_argnames=("model",),
    compiler_options={"xla_backend_optimization_level": 0},
)
def fresh_variables(model: nn.Module, key: Array, images: np.ndarray) -> Variables:
    """The model's variables at the start of training, drawn from `key`, without boxes of Flax."""
    return unboxed(as_network(model).init(key, images))


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

        Raises ConfigError if it was run with another config, or its packed file is not the one
        that the record is about.
        """
        path = self.folder(name, seed) / RESULT
        if not path.exists():
            return None
        record = self.record(name, seed)
        if record.arm_digest != self.digests[name]:
            changed = self._differences()
            changed = changed or f"digest {record.arm_digest}, now {self.digests[name]}"
            raise ConfigError(
                f"{path} was made with another config ({changed}): choose another workdir, or "
                f"delete {path.parent}"
            )
        packed, expected = path.parent / PACKED, record.packed_sha256
        if expected and packed.exists() and file_digest(packed) != expected:
            raise ConfigError(
                f"{packed} is damaged, or not the file that its result.json is about: delete both, "
                "and the same command makes them again from the arm's checkpoint"
            )
        return dataclasses.replace(record, reference=self._experiment.arms[name].reference)

    def _differences(self) -> str:
        """Returns what the config has otherwise than the one that the workdir was last run with.

        That is "" if it is nothing. Arms, models and the like that only one has are no difference.
        """
        try:
            before = read_config(self.workdir)
        except (OSError, ValueError):  # a ConfigError, too
            before = None
        if before is None:
            return ""
        default = {f.name: f.default for f in dataclasses.fields(Experiment) if f.name in PLACES}
        there, here = (
            _leaves(
                kdq_config.to_json(
                    dataclasses.replace(
                        each, **default, seeds=(), data=dataclasses.replace(each.data, data_dir="")
                    )
                )
            )
            for each in (before, self._experiment)
        )
        changed = [key for key in there if key in here and there[key] != here[key]]
        said = [f"{key} was {there[key]!r}, is {here[key]!r}" for key in changed[:SHOWN]]
        more = len(changed) - len(said)
        return ", ".join([*said, *([f"and {more} more"] if more else [])])

    def save_config(self) -> None:
        """Writes the config that is run here, for those who look at it later."""
        path = self.workdir / CONFIG
        data = files.json_text(kdq_config.to_json(self._experiment)).encode()
        if not path.is_file() or path.read_bytes() != data:
            files.write_atomic(path, data)

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
            return self.selected(name, seed)["weights"]
        return load(arms[name].load).variables

    def selected(self, name: str, seed: int) -> dict[str, Variables]:
        """Returns the networks that a trained arm's record is about.

        These are "weights" and, if a peer taught the arm, "peer": its variables at the step that
        the arm selected.

        Raises CheckpointError if no checkpoint has them.
        """
        folder = self.folder(name, seed)
        record = self._expected.get((name, seed)) or self.record(name, seed)
        with Checkpointer(folder / "checkpoints", alone=True) as checkpointer:
            for step in reversed(checkpointer.steps()):
                parts = checkpointer.read(step, {"selected": None})
                if parts is None:
                    continue
                networks, step = parts[0]["selected"], parts[1]["selected"]["step"]
                trees = {"weights": _variables(networks)}
                if "peer" in networks:
                    trees["peer"] = _variables(networks["peer"])
                if not record.weights_sha256:  # it is from before there were digests
                    is_selected = step == record.selected_step
                else:
                    is_selected = all(
                        digest_variables(tree) == getattr(record, f"{network}_sha256")
                        for network, tree in trees.items()
                    )
                if is_selected:
                    return trees
        raise CheckpointError(
            f"{folder / 'checkpoints'} has no checkpoint with the weights that "
            f"{folder / RESULT} is about: delete {folder} to train the arm again"
        )


def digests_of(selection: Selection) -> dict[str, str]:
    """Returns the part of a record that names the weights that training selected, and its peer's.

    Nothing for an arm that was not trained, which has none of its own to hand on.
    """
    record = {}
    if selection.step:
        record["weights_sha256"] = digest_variables(selection.weights.variables)
    if selection.peer:
        record["peer_sha256"] = digest_variables(_variables(selection.peer))
    return record


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _variables(parts: Mapping[str, Any]) -> Variables:
    """Returns {"params", "model_state"} as a model takes it."""
    return jax.tree.map(jnp.asarray, {"params": parts["params"], **parts["model_state"]})


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """{"arms.kd.epochs": 4.0, ...}"""
    if not isinstance(value, Mapping):
        return {path: value}
    leaves = {}
    for key, inner in value.items():
        leaves |= _leaves(inner, f"{path}.{key}" if path else key)
    return leaves
