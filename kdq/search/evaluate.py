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
from kdq.search.objectives import OBJECTIVES, HeldOut, Scores, means, sums_of
from kdq.types import Array, Batch, Variables


@dataclasses.dataclass(kw_only=True)
class Evaluator:
    """Scores policies of one student on held-out examples; nothing is trained."""

    network: Network | nn.Module
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
            sums = [
                _evaluate(self.network, self.variables, self.bank, chosen, h) for h in self.held
            ]
            scores.append({name: values[: len(part)] for name, values in means(sums).items()})
        return {name: np.concatenate([part[name] for part in scores]) for name in OBJECTIVES}

    @property
    def float_policy(self) -> tuple[int, ...]:
        """The policy that quantizes no layer."""
        return (-1,) * len(self.choices)

    def chosen(self, policy: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns {layer path: place of its choice} of a policy."""
        return dict(zip(self.choices, np.asarray(policy, np.int32), strict=True))


def predict(network: Network, weights: Weights, inputs: Array, **options: Any) -> Array:
    """Returns the prediction of a quantized student, [examples, ...]; may be traced."""
    return network.select_prediction(network.apply(weights, inputs, **options))


@partial(jax.jit, static_argnames=("network",))
def _evaluate(
    network: Network, variables: Variables, bank: Bank, chosen: Mapping[str, Array], held: HeldOut
) -> dict[str, Array]:
    """Returns sums of policies, [policies] each, for chosen places [policies]."""

    def evaluate(chosen: Mapping[str, Array]) -> dict[str, Array]:
        weights = Weights(variables=variables, qparams=banks.choose(bank, chosen))
        return sums_of(predict(network, weights, held.images), held)

    (count,) = {len(places) for places in chosen.values()}
    if count == 1:  # without the axis that makes other convolutions of them
        sums = evaluate({path: places[0] for path, places in chosen.items()})
        return jax.tree.map(lambda value: value[None], sums)
    return jax.vmap(evaluate)(chosen)


def score(network: Network, weights: Weights, held: Sequence[HeldOut]) -> dict[str, float]:
    """Returns the scores of one quantized student by objective."""
    sums = [_score(network, weights, batch) for batch in held]
    return {name: float(value) for name, value in means(sums).items()}


@partial(jax.jit, static_argnames=("network",))
def _score(network: Network, weights: Weights, held: HeldOut) -> dict[str, Array]:
    return sums_of(predict(network, weights, held.images), held)


def hold_out(
    network: Network | nn.Module,
    variables: Variables,
    batches: Sequence[Batch],
    teacher: np.ndarray,
) -> list[HeldOut]:
    """Returns held-out batches with the outputs that policies are compared with.

    Args:
      network: the student.
      variables: float.
      batches: with "image", "label" and "mask"; the last may be padded.
      teacher: [examples, classes], the teacher's logits on what is not padded, in order.
    """
    float_weights = Weights(variables=variables, qparams={})
    float_logits = jax.jit(partial(predict, as_network(network), float_weights))
    held, done = [], 0
    for batch in batches:
        mask = np.asarray(batch["mask"])
        count = int(mask.sum())
        logits = np.zeros((len(mask), teacher.shape[1]), np.float32)
        logits[:count] = teacher[done : done + count]
        done += count
        images = jnp.asarray(batch["image"])
        held.append(
            HeldOut(
                images=images,
                labels=jnp.asarray(batch["label"]),
                mask=jnp.asarray(mask),
                teacher=jnp.asarray(logits),
                float_logits=float_logits(images),
            )
        )
    return held
