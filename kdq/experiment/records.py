"""Digests by which a record names the weights and the file that it is about."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kdq.config import ConfigError
from kdq.distill.cache_key import digest_variables
from kdq.record import ArmRecord
from kdq.train.loop import Selection
from kdq.types import Variables


def variables_of(parts: Mapping[str, Any]) -> Variables:
    """Returns {"params", "model_state"} as a model takes it."""
    return jax.tree.map(jnp.asarray, {"params": parts["params"], **parts["model_state"]})


def digests_of(selection: Selection) -> dict[str, str]:
    """Returns the part of a record that names the weights that training selected, and its peer's.

    Nothing for an arm that was not trained, which has none of its own to hand on.
    """
    record = {}
    if selection.step:
        record["weights_sha256"] = digest_variables(selection.weights.variables)
    if selection.peer:
        record["peer_sha256"] = digest_variables(variables_of(selection.peer))
    return record


def is_about(record: ArmRecord, networks: Mapping[str, Variables], step: int) -> bool:
    """Returns whether a record is about networks ("weights", "peer") selected at a step."""
    if not record.weights_sha256:  # it is from before there were digests
        return step == record.selected_step
    return all(
        digest_variables(variables) == getattr(record, f"{name}_sha256")
        for name, variables in networks.items()
    )


def check_packed(record: ArmRecord, path: Path) -> None:
    """Raises ConfigError if the packed file, where it is there, is another than the record's."""
    expected = record.packed_sha256
    if expected and path.exists() and file_digest(path) != expected:
        raise ConfigError(
            f"{path} is damaged, or not the file that its result.json is about: delete both, and "
            "the same command makes them again from the arm's checkpoint"
        )


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
