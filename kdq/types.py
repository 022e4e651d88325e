"""The vocabulary every package shares: aliases and Protocols, nothing else."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

Array = jax.Array

# One batch of examples: "image" [batch, height, width, channels] float32, "label" [batch] int32,
# "id" [batch] int32 (the example's index in its split). Evaluation batches also carry "mask"
# [batch] float32, 0 on the rows that only pad the last batch; training batches of a cached teacher
# carry "teacher_logits" [batch, classes] float32.
Batch = Mapping[str, Array]

# A Linen variable dict: "params" and, for models with batch norm, "batch_stats".
Variables = Mapping[str, Any]

# {layer path: {"weights" | "activations" | "other": a kdq.quantize.Quantizer}}; "other" is the
# second factor of a product of activations.
QParams = Mapping[str, Mapping[str, Any]]


class Mean(NamedTuple):
    """A mean over predictions or examples, not divided yet: those of parts of a batch add up."""

    total: Array
    count: Array


# Scalars of a step by name, and means over its batch, divided on the host.
Metrics = Mapping[str, Array | Mean]
