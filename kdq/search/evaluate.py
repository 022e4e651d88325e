"""Evaluates policies: one compiled function for every layer, choice and policy."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize import Network, Weights, as_network
from kdq.search import bank as banks
from kdq.search.bank import Bank, Choices
from kdq.search.objectives import OBJECTIVES, HeldOut, Scores, Sums, compute_scores, sum_scores
from kdq.tasks import Task
from kdq.types import Array, Batch, Variables

Inputs = tuple[Array, ...]  # a model's positional arguments


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
            args = self.network, self.variables, self.bank, chosen
            sums = [_evaluate(*args, held, task=self.task) for held in self.held]
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
    variables: Variables,
    bank: Bank,
    chosen: Mapping[str, Array],
    held: HeldOut,
    *,
    task: Task,
) -> Sums:
    """Returns sums of policies, with an axis [policies], for chosen places [policies]."""

    def evaluate(chosen: Mapping[str, Array]) -> Sums:
        weights = Weights(variables=variables, qparams=banks.choose(bank, chosen))
        return sum_scores(task, predict(network, weights, task.inputs(held.batch)), held)

    (count,) = {len(places) for places in chosen.values()}
    if count == 1:  # without the axis that makes other convolutions of them
        sums = evaluate({path: places[0] for path, places in chosen.items()})
        return jax.tree.map(lambda value: value[None], sums)
    return jax.vmap(evaluate)(chosen)


def score(
    network: Network, weights: Weights, task: Task, held: Sequence[HeldOut]
) -> dict[str, float]:
    """Returns the scores of one quantized student by objective."""
    sums = [_score(network, weights, batch, task=task) for batch in held]
    return {name: float(value[0]) for name, value in compute_scores(task, sums).items()}


@partial(jax.jit, static_argnames=("network", "task"))
def _score(network: Network, weights: Weights, held: HeldOut, *, task: Task) -> Sums:
    sums = sum_scores(task, predict(network, weights, task.inputs(held.batch)), held)
    return jax.tree.map(lambda value: value[None], sums)


def hold_out(
    network: Network | nn.Module,
    variables: Variables,
    task: Task,
    batches: Sequence[Batch],
    teacher: np.ndarray,
) -> list[HeldOut]:
    """Returns held-out batches with the outputs that policies are compared with.

    Args:
      network: the student.
      variables: float.
      task: how batches become its inputs.
      batches: with what the task reads, and "mask"; the last may be padded.
      teacher: [examples, ..., outputs], the teacher's on what is not padded, in order.
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
        held.append(
            HeldOut(
                batch=arrays,
                teacher=jnp.asarray(outputs),
                float_outputs=float_outputs(task.inputs(arrays)),
            )
        )
    return held
