"""What training minimizes: task and distillation, summed to one scalar."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from kdq.distill import losses
from kdq.types import Array, Batch, Metrics


class Objective(flax.struct.PyTreeNode):
    """`(1 - alpha) CE + alpha T² KL(teacher ‖ student)`, averaged over the batch.

    The weights are data, not constants: one compiled step serves every alpha and temperature.
    """

    alpha: Array | float = 0.0  # weight of the teacher, 0 to 1; unused without one
    temperature: Array | float = 1.0

    def __call__(
        self, logits: Array, batch: Batch, teacher_logits: Array | None
    ) -> tuple[Array, Metrics]:
        """The scalar loss, and sums over the examples that count.

        Args:
          logits: [batch, classes].
          batch: "label" [batch]; "mask" [batch], if there, weighs the examples.
          teacher_logits: [batch, classes], or None for labels only.

        Returns:
          The mean loss, and `{"loss", "task_loss", "correct", "count"}` (with a teacher also
          "distill_loss"), each a masked sum.
        """
        task = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["label"]
        )
        values = {"task_loss": task, "correct": logits.argmax(-1) == batch["label"]}
        if teacher_logits is None:
            values["loss"] = task
        else:
            distill = losses.kl(logits, teacher_logits, self.temperature)
            values |= {
                "distill_loss": distill,
                "loss": (1 - self.alpha) * task + self.alpha * distill,
            }
        mask = batch.get("mask", jnp.ones_like(task))
        sums = {name: jnp.sum(mask * value) for name, value in values.items()}
        sums["count"] = jnp.sum(mask)
        return sums["loss"] / jnp.maximum(sums["count"], 1), jax.lax.stop_gradient(sums)
