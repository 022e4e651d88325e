"""The task that a network is trained for: its inputs, its loss and its scores."""

import dataclasses

import jax.numpy as jnp

from kdq.distill.losses import cross_entropy
from kdq.types import Array, Batch


@dataclasses.dataclass(frozen=True)
class Classification:
    """One class for each prediction, [batch] or [batch, positions]; outputs are logits."""

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns the model's positional arguments."""
        return (batch["image"],)

    def weights(self, batch: Batch) -> Array:
        """Returns 1 for each prediction that counts, else 0: float32 in the labels' shape."""
        shape = jnp.shape(batch["label"])
        if (mask := batch.get("mask")) is None:
            return jnp.ones(shape)
        mask = jnp.asarray(mask, jnp.float32)
        return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)

    def loss(self, outputs: Array, batch: Batch, label_smoothing: Array | float = 0.0) -> Array:
        """Returns the cross-entropy of each prediction, in the shape of `weights`."""
        return cross_entropy(outputs, batch["label"], label_smoothing)

    def scores(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """Returns "accuracy" of each prediction, 0 or 1, in the shape of `weights`."""
        return {"accuracy": outputs.argmax(-1) == batch["label"]}
