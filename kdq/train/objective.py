"""What training minimizes: the task and what a teacher adds, summed to one scalar."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kdq.config import Distill, Experiment
from kdq.distill import losses, schedule, term
from kdq.distill.capture import Outputs
from kdq.distill.schedule import Schedule
from kdq.distill.term import Term
from kdq.fields import limits_of
from kdq.types import Array, Batch, Metrics

LABELS = schedule.constant(1.0)


class Objective(flax.struct.PyTreeNode):
    """`task(t) · CE(labels) + Σ weight_i(t) · term_i`, averaged over the batch.

    Weights, temperatures and the like are data, not constants: one compiled step serves them all.
    """

    task: Schedule = LABELS  # weight of the cross-entropy with the labels
    terms: tuple[Term, ...] = ()
    label_smoothing: Array | float = 0.0
    steps: Array | float = 1.0  # of the whole training, for the schedules

    @property
    def student_layers(self) -> frozenset[str]:
        return frozenset(path for one in self.terms for path in one.student)

    @property
    def teacher_layers(self) -> frozenset[str]:
        return frozenset(path for one in self.terms for path in one.teacher)

    def init(self, key: Array, student: term.Shapes, teacher: term.Shapes, num_examples: int):
        """`(adapters, memory)` by the name of the term, of the terms that have any; see `Term`."""
        found = {
            one.name: one.init(jax.random.fold_in(key, i), student, teacher, num_examples)
            for i, one in enumerate(self.terms)
        }
        return tuple(
            {name: parts[i] for name, parts in found.items() if jax.tree.leaves(parts[i])}
            for i in range(2)
        )

    def __call__(
        self,
        student: Outputs,
        batch: Batch,
        teacher: Outputs | None,
        *,
        adapters: dict[str, Any] | None = None,
        memory: dict[str, Any] | None = None,
        step: Array | int = 0,
        key: Array | None = None,
    ) -> tuple[Array, Metrics, dict[str, Any]]:
        """The scalar loss, sums over the examples that count, and the memory of the terms.

        Args:
          student: its logits [batch, classes], and the features that the terms look at.
          batch: "label" [batch]; "mask" [batch], if there, weighs the examples.
          teacher: the same of the teacher; None for labels only.
          adapters: the terms' own parameters, by name, as `init` made them.
          memory: what the terms remember, by name.
          step: steps taken.
          key: random, of this step.

        Returns:
          The mean loss; `{"loss", "task_loss", "correct", "count"}` and for each term its
          "NAME_loss" (not weighted), each a masked sum; and the memory after this step.
        """
        if self.terms and teacher is None:
            raise ValueError(f"terms {[one.name for one in self.terms]} want a teacher: given None")
        progress = jnp.asarray(step, jnp.float32) / self.steps
        task = losses.cross_entropy(student.logits, batch["label"], self.label_smoothing)
        values = {"task_loss": task, "correct": student.logits.argmax(-1) == batch["label"]}
        loss = self.task(progress) * task
        memory = dict(memory or {})
        for i, one in enumerate(self.terms):
            own, remembered = one(
                (adapters or {}).get(one.name, {}),
                memory.get(one.name, {}),
                student,
                teacher,
                batch,
                None if key is None else jax.random.fold_in(key, i),
            )
            if one.name in memory:
                memory[one.name] = remembered
            values[f"{one.name}_loss"] = own
            loss = loss + one.weight(progress) * own
        values["loss"] = loss
        mask = batch.get("mask", jnp.ones_like(task))
        sums = {name: jnp.sum(mask * value) for name, value in values.items()}
        sums["count"] = jnp.sum(mask)
        mean = sums["loss"] / jnp.maximum(sums["count"], 1)
        return mean, jax.lax.stop_gradient(sums), jax.lax.stop_gradient(memory)


def of_arm(experiment: Experiment, name: str, steps: int) -> Objective:
    """The objective of an arm that trains for `steps`: of labels alone, or with a recipe's terms.

    Raises ConfigError for what the recipe gets wrong.
    """
    arm = experiment.arms[name]
    own = experiment.distill[arm.distill] if arm.distill else None
    found = of_recipe(own and vars(own), steps, f"config.distill.{arm.distill}")
    return found.replace(label_smoothing=jnp.float32(arm.label_smoothing))


def of_recipe(recipe: Mapping[str, Any] | None, steps: int, where: str) -> Objective:
    """The objective of a recipe, an entry of `config.distill`; of labels alone if there is none.

    Args:
      recipe: "task", a number or a schedule, and "terms" by name.
      steps: of the whole training.
      where: it is, for messages.

    Raises:
      ConfigError: what the recipe gets wrong.
    """
    objective = Objective(label_smoothing=jnp.float32(0), steps=jnp.float32(steps))
    if recipe is None:
        return objective
    terms = (
        term.build(key, fields, f"{where}.terms.{key}") for key, fields in recipe["terms"].items()
    )
    return objective.replace(
        task=schedule.build(recipe["task"], f"{where}.task", limits_of(Distill, "task")),
        terms=tuple(terms),
    )
