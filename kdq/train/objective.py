"""The objective that training minimizes: the task's loss and the terms of a teacher."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdq.config import Distill, Experiment
from kdq.distill import schedule
from kdq.distill import term as term_lib
from kdq.distill.capture import Outputs
from kdq.distill.schedule import Schedule
from kdq.distill.term import Term
from kdq.fields import limits_of
from kdq.tasks.base import Task
from kdq.types import Array, Batch

LABELS = schedule.constant(1.0)


class Objective(flax.struct.PyTreeNode):
    """`task_weight(t) · mean(task's loss) + Σ weight_i(t) · mean(term_i)`.

    Each mean is over what its own loss is of: predictions, or examples. Weights, temperatures and
    the like are data, not constants: one compiled step serves them all.
    """

    task: Task = flax.struct.field(default=term_lib.CLASSIFICATION, pytree_node=False)
    task_weight: Schedule = LABELS
    terms: tuple[Term, ...] = ()
    # Keywords of the task's loss, such as "label_smoothing".
    options: Mapping[str, Array | float] = flax.struct.field(default_factory=dict)
    steps: Array | float = 1.0  # of the whole training, for the schedules

    @property
    def student_layers(self) -> frozenset[str]:
        return frozenset(path for term in self.terms for path in term.student)

    @property
    def teacher_layers(self) -> frozenset[str]:
        return frozenset(path for term in self.terms for path in term.teacher)

    def init(
        self, key: Array, student: term_lib.Shapes, teacher: term_lib.Shapes, num_examples: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns `(adapters, memory)` by the names of the terms that have any; see `Term.init`."""
        adapters, memory = {}, {}
        for i, term in enumerate(self.terms):
            term_key = jax.random.fold_in(key, i)
            params, remembered = term.init(term_key, student, teacher, num_examples)
            if jax.tree.leaves(params):
                adapters[term.name] = params
            if jax.tree.leaves(remembered):
                memory[term.name] = remembered
        return adapters, memory

    def counts(self, batch: Batch) -> dict[str, Array]:
        """Returns how many values count of the task's loss and of each term, by names of totals.

        They depend on the batch alone, so that those of a whole batch divide totals of its parts.
        """
        weights = self.task.weights(batch)
        terms = {f"{term.name}_loss": term.count(batch, weights) for term in self.terms}
        return {"task_loss": jnp.sum(weights), **terms}

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        *,
        counts: Mapping[str, Array] | None = None,
        adapters: Mapping[str, Any] = {},
        memory: Mapping[str, Any] = {},
        step: Array | int = 0,
        key: Array | None = None,
    ) -> tuple[Array, dict[str, Array], dict[str, Any]]:
        """Returns the scalar loss, the totals it is made of, and the memory of the terms.

        Outputs of the student and the teacher (None for labels only) are logits [batch, ...,
        classes] and the features that the terms look at; "mask" [batch] of the batch, if there,
        weighs the examples. `counts` are of the whole batch that `batch` is a part of, `adapters`
        and `memory` as `init` made them, `key` is random, of this step.

        Totals are masked sums, not weighted: "task_loss", the scores that the task's primary metric
        is of, and "NAME_loss" of each term.
        """
        if self.terms and teacher is None:
            raise ValueError(f"terms {[t.name for t in self.terms]} need a teacher, got None")
        counts = self.counts(batch) if counts is None else counts
        progress = jnp.asarray(step, jnp.float32) / self.steps
        # A weight goes before the division: without a mask the gradients are, to the bit, those of
        # the mean over the batch of weighted sums.
        mean = lambda weight, name: weight * totals[name] / jnp.maximum(counts[name], 1)
        weights = self.task.weights(batch)
        scores = self.task.scores(student.logits, batch)
        values = {
            "task_loss": self.task.loss(student.logits, batch, **self.options),
            **{name: scores[name] for name in self.task.primary.scores},
        }
        # Over predictions; of each output where those are scored apart.
        outputs = lambda x: (1,) * (x.ndim - weights.ndim)
        totals = {
            name: jnp.sum(weights.reshape(weights.shape + outputs(x)) * x, range(weights.ndim))
            for name, x in values.items()
        }
        loss = mean(self.task_weight(progress), "task_loss")
        memory = dict(memory)
        for i, term in enumerate(self.terms):
            name = f"{term.name}_loss"
            values, remembered = term(
                adapters.get(term.name, {}),
                memory.get(term.name, {}),
                term.look(student, teacher, batch, weights),
                None if key is None else jax.random.fold_in(key, i),
            )
            totals[name] = jnp.sum(values)
            if term.name in memory:
                memory[term.name] = remembered
            loss += mean(term.weight(progress), name)
        return loss, jax.lax.stop_gradient(totals), jax.lax.stop_gradient(memory)


def arm_objective(experiment: Experiment, name: str, steps: int, task: Task) -> Objective:
    """Builds the objective of an arm that trains for `steps` on a task; see `build`."""
    arm = experiment.arms[name]
    recipe = vars(experiment.distill[arm.distill]) if arm.distill else None
    objective = build(recipe, steps, f"config.distill.{arm.distill}", task)
    options = {name: np.float32(getattr(arm, name)) for name in task.loss_options}
    return objective.replace(options=options)


def build(
    recipe: Mapping[str, Any] | None,
    steps: int,
    where: str,
    task: Task = term_lib.CLASSIFICATION,
) -> Objective:
    """Builds the objective of a recipe, an entry of `config.distill`; of labels alone if None.

    A recipe has "task", a number or a schedule, and "terms" by name; `where` is its key, and
    `steps` are of the whole training. Raises ConfigError for what it gets wrong.
    """
    objective = Objective(task=task, steps=jnp.float32(steps))
    if recipe is None:
        return objective
    return objective.replace(
        task_weight=schedule.build(recipe["task"], f"{where}.task", limits_of(Distill, "task")),
        terms=tuple(
            term_lib.build(name, fields, f"{where}.terms.{name}", task)
            for name, fields in recipe["terms"].items()
        ),
    )
