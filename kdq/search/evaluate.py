"""Scores of policies: one compiled function for every layer, choice and policy.

By calibration alone; or after a short training, as calibration can mislead on low bits.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import quantize
from kdq.quantize import Network, Weights, as_network
from kdq.search import bank as banks
from kdq.search.bank import Bank, Choices
from kdq.tasks import Metric, Task
from kdq.tasks.base import NOISE, weighted_sum
from kdq.tasks.metric import identity
from kdq.train import loop
from kdq.train.training import Plan, TrainState
from kdq.types import Array, Batch, Variables

Inputs = tuple[Array, ...]  # a model's positional arguments

# Less is better: the distance from the teacher, the task's loss, the error by its primary metric,
# and noise over signal of the outputs (the inverse of their SQNR). Of classification: nats to the
# teacher, nats to the labels, the share of wrong classes.
OBJECTIVES = ("kl", "loss", "error", "noise")

WORST = 1e9  # the score of what is not finite: more than any other's, and JSON has it

Scores = dict[str, np.ndarray]  # {objective: [policies]}
Sums = dict[str, dict[str, Array]]  # {objective: {score: its sum}}, and "count"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A batch of held-out examples, and the outputs that predictions are compared with."""

    batch: Batch  # with the task's keys and target; and "mask", 0 of padding
    teacher: Array  # [examples, ..., outputs]
    float_outputs: Array  # the same, of the student itself

    def rows(self, task: Task) -> np.ndarray:
        """Returns the places of the examples that count; not traced."""
        weights = np.asarray(task.weights(self.batch))
        return np.flatnonzero(weights.reshape(len(weights), -1).any(-1))


def distance(task: Task) -> Metric:
    """Returns the first metric of a task's fidelity of which less is better."""
    return next(metric for metric in task.fidelity if not metric.higher_is_better)


def sum_scores(task: Task, outputs: Array, held: HeldOut) -> Sums:
    """Returns sums over the predictions that count; outputs: [examples, ..., outputs]."""
    weights = task.weights(held.batch)

    def add(values: Array) -> Array:
        """Sums values [predictions] or [predictions, outputs]."""
        if values.ndim == weights.ndim:
            return weighted_sum(values, weights)[0]
        return jax.vmap(lambda column: weighted_sum(column, weights)[0], in_axes=-1)(values)

    scores = task.scores(outputs, held.batch)
    from_teacher = task.divergence(outputs, held.teacher)
    from_float = task.divergence(outputs, held.float_outputs)
    return {
        "kl": {name: add(from_teacher[name]) for name in distance(task).scores},
        "loss": {"loss": add(task.loss(outputs, held.batch))},
        "error": {name: add(scores[name]) for name in task.primary.scores},
        "noise": {name: add(from_float[name]) for name in NOISE.scores},
        "count": {"count": jnp.sum(weights)},
    }


def compute_scores(task: Task, sums: Sequence[Sums]) -> Scores:
    """Returns scores [policies] from each batch's sums; `WORST` of what is not finite.

    Sums are [policies] or [policies, outputs].
    """
    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), 0), *sums)
    count, policies = total["count"]["count"], range(len(total["count"]["count"]))

    def values(metric: Metric, sums: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns those of a metric, turned so that less is better."""
        if metric.higher_is_better and metric.of_mean is identity:  # without 1 - 0.7
            (hits,) = (sums[name] for name in metric.scores)
            return (count - hits) / count
        means = [[sums[name][i] / count[i] for name in metric.scores] for i in policies]
        value = np.array([metric.from_means(*each) for each in means])
        return 1 - value if metric.higher_is_better else value

    with np.errstate(divide="ignore", invalid="ignore"):
        scores = {
            "kl": values(distance(task), total["kl"]),
            "loss": total["loss"]["loss"] / count,
            "error": values(task.primary, total["error"]),
            "noise": total["noise"]["noise"] / total["noise"]["signal"],
        }
    return {name: np.where(np.isfinite(v), v, WORST) for name, v in scores.items()}


@dataclasses.dataclass(kw_only=True)
class Evaluator:
    """Scores policies of one student on held-out examples; nothing is trained."""

    network: Network | nn.Module
    task: Task
    variables: Variables  # float
    choices: Choices  # of its layers; others stay in float
    bank: Bank
    held: Sequence[HeldOut]  # batches of one shape
    at_once: int = 1  # policies that one call of the device evaluates
    evaluations: int = 0  # so far

    def __post_init__(self) -> None:
        self.network = as_network(self.network)

    def __call__(self, policies: Sequence[Sequence[int]]) -> Scores:
        """Returns scores of policies, each the place of a choice for each layer; -1 is float."""
        self.evaluations += len(policies)
        scores: list[Scores] = []
        for start in range(0, len(policies), self.at_once):
            part = np.asarray(policies[start : start + self.at_once], np.int32)
            whole = np.resize(part, (self.at_once, part.shape[1]))  # one shape for all calls
            chosen = {path: whole[:, i] for i, path in enumerate(self.choices)}
            # Dispatched for all batches before the first is waited for.
            weights = Weights(variables=self.variables, qparams=self.bank)
            sums = [
                _evaluate(self.network, weights, chosen, held, task=self.task) for held in self.held
            ]
            values = compute_scores(self.task, sums)
            scores.append({name: column[: len(part)] for name, column in values.items()})
        return {name: np.concatenate([part[name] for part in scores]) for name in OBJECTIVES}

    @property
    def float_policy(self) -> tuple[int, ...]:
        """The policy that quantizes no layer."""
        return (-1,) * len(self.choices)

    def chosen(self, policy: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns {layer path: place of its choice} of a policy."""
        return dict(zip(self.choices, np.asarray(policy, np.int32), strict=True))


def predict(network: Network, weights: Weights, inputs: Inputs, **options: Any) -> Array:
    """Returns the prediction of a quantized student, [examples, ...]; may be traced."""
    return network.select_prediction(network.apply(weights, inputs, **options))


@partial(jax.jit, static_argnames=("network", "task"))
def _evaluate(
    network: Network,
    weights: Weights,  # with a bank, if anything is chosen
    chosen: Mapping[str, Array],  # {layer path: places [policies]}
    held: HeldOut,
    *,
    task: Task,
) -> Sums:
    """Returns sums of policies, with an axis [policies]; of the weights as they are it has one."""

    def evaluate(chosen: Mapping[str, Array]) -> Sums:
        qparams = banks.choose(weights.qparams, chosen) if chosen else weights.qparams
        student = Weights(variables=weights.variables, qparams=qparams)
        return sum_scores(task, predict(network, student, task.inputs(held.batch)), held)

    if all(len(places) == 1 for places in chosen.values()):
        # Without the axis that makes other convolutions of them.
        sums = evaluate({path: places[0] for path, places in chosen.items()})
        return jax.tree.map(lambda value: value[None], sums)
    return jax.vmap(evaluate)(chosen)


def score(
    network: Network, weights: Weights, task: Task, held: Sequence[HeldOut]
) -> dict[str, float]:
    """Returns the scores of one quantized student by objective."""
    sums = [_evaluate(network, weights, {}, batch, task=task) for batch in held]
    return {name: float(value[0]) for name, value in compute_scores(task, sums).items()}


def hold_out(
    network: Network | nn.Module,
    variables: Variables,
    task: Task,
    batches: Sequence[Batch],
    teacher: np.ndarray,
) -> list[HeldOut]:
    """Returns held-out batches with the outputs that policies are compared with.

    Batches have what the task reads, and "mask", and the last may be padded; `teacher` [examples,
    ..., outputs] is the teacher's on what is not padded, in order.
    """
    float_weights = Weights(variables=variables, qparams={})
    float_outputs = jax.jit(partial(predict, as_network(network), float_weights))
    held, done = [], 0
    for batch in batches:
        mask = np.asarray(batch["mask"])
        count = int(mask.sum())
        outputs = np.zeros((len(mask), *teacher.shape[1:]), np.float32)
        outputs[:count] = teacher[done : done + count]
        done += count
        arrays = jax.tree.map(jnp.asarray, dict(batch))
        by_float = float_outputs(task.inputs(arrays))
        held.append(HeldOut(batch=arrays, teacher=jnp.asarray(outputs), float_outputs=by_float))
    return held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """Trains a policy for a few steps by the ordinary step, always on the same batches.

    Bits, and which terms of the recipe count, are data: all policies share one compiled step.
    """

    evaluator: Evaluator  # of the student
    begin: Callable[[Weights], tuple[Plan, TrainState]]
    method: str  # of quantization-aware training
    distilled: tuple[str, ...]  # terms that a policy may leave out

    def __call__(self, policy: Sequence[int], kept: Sequence[bool]) -> Mapping[str, float]:
        """Returns the scores of a policy, a place for each layer, trained by the terms `kept`."""
        student = self.evaluator
        qparams = banks.choose(student.bank, student.chosen(policy))
        variables, qparams = quantize.prepare(student.variables, qparams, self.method)
        plan, state = self.begin(Weights(variables=variables, qparams=qparams))
        left_out = [name for name, keep in zip(self.distilled, kept, strict=True) if not keep]
        objective = plan.training.objective
        terms = tuple(
            term.replace(weight=term.weight.replace(values=0 * term.weight.values))
            if term.name in left_out
            else term
            for term in objective.terms
        )
        training = plan.training.replace(objective=objective.replace(terms=terms))
        state = loop.take_steps(dataclasses.replace(plan, training=training), state)
        if bool(state.halted):
            return dict.fromkeys(OBJECTIVES, WORST)
        return score(student.network, loop.weights(state), student.task, student.held)
