"""How good a policy is: one compiled function for every layer, choice and policy."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import quantize
from kdq.distill.losses import cross_entropy
from kdq.quantize.ptq.divergence import kl
from kdq.search import bank as banks
from kdq.search.bank import Bank, Choices
from kdq.types import Array, Batch, QParams, Variables

# What a policy is measured by, each the less the better: nats to the teacher, nats to the labels,
# share of wrong classes, and noise over signal of the logits (the inverse of their SQNR).
OBJECTIVES = ("kl", "loss", "error", "noise")

WORST = 1e9  # the score of what is not finite: more than any other's, and JSON has it

Scores = dict[str, np.ndarray]  # {objective: [policies]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """A batch of held-out examples, and what is compared with."""

    images: Array
    labels: Array  # [examples] int
    mask: Array  # [examples], 0 on what only pads
    teacher: Array  # [examples, classes] logits
    float_logits: Array  # [examples, classes], of the student itself


jax.tree_util.register_dataclass(Held)


@dataclasses.dataclass(kw_only=True)
class Evaluator:
    """Scores policies of one student on held-out examples; nothing is trained.

    Args:
      model: the student.
      variables: float.
      choices: of its layers; others stay in float.
      bank: see `banks.fill`.
      held: batches of one shape.
      at_once: policies that one call of the device evaluates.
    """

    model: nn.Module
    variables: Variables
    choices: Choices
    bank: Bank
    held: Sequence[Held]
    at_once: int = 1
    evaluations: int = 0  # so far

    def __call__(self, policies: Sequence[Sequence[int]]) -> Scores:
        """Scores of policies, each the place of a choice for each layer; -1 is float."""
        self.evaluations += len(policies)
        found: list[dict[str, np.ndarray]] = []
        for start in range(0, len(policies), self.at_once):
            part = np.asarray(policies[start : start + self.at_once], np.int32)
            whole = np.resize(part, (self.at_once, part.shape[1]))  # one shape for all calls
            chosen = {path: whole[:, i] for i, path in enumerate(self.choices)}
            # Dispatched for all batches before the first is waited for.
            sums = [
                _evaluate(self.model, self.variables, self.bank, chosen, one) for one in self.held
            ]
            found.append({k: v[: len(part)] for k, v in means(sums).items()})
        return {name: np.concatenate([part[name] for part in found]) for name in OBJECTIVES}

    @property
    def float_policy(self) -> tuple[int, ...]:
        """No layer quantized."""
        return (-1,) * len(self.choices)


def sums_of(logits: Array, held: Held) -> dict[str, Array]:
    """Sums over the examples that count."""
    # A class that the student rules out, by a logit of −inf, is no part of the noise either.
    possible = ~jnp.isneginf(held.float_logits)
    signal = jnp.where(possible, held.float_logits, 0)
    each = {
        "kl": kl(held.teacher, logits),
        "loss": cross_entropy(logits, held.labels),
        "error": (logits.argmax(-1) != held.labels).astype(jnp.float32),
        "signal": jnp.square(signal).sum(-1),
        "noise": jnp.square(jnp.where(possible, logits, 0) - signal).sum(-1),
        "count": jnp.ones_like(held.mask),
    }
    return {name: jnp.sum(held.mask * value) for name, value in each.items()}


def means(sums: Sequence[Mapping[str, Array]]) -> Scores:
    """Scores from the sums over batches; `WORST` of what is not finite."""
    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), 0), *sums)
    over = {name: total["signal" if name == "noise" else "count"] for name in OBJECTIVES}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {name: total[name] / over[name] for name in OBJECTIVES}
    return {name: np.where(np.isfinite(v), v, WORST) for name, v in found.items()}


@partial(jax.jit, static_argnames=("model",))
def _evaluate(
    model: nn.Module, variables: Variables, bank: Bank, chosen: Mapping[str, Array], held: Held
) -> dict[str, Array]:
    def one(chosen: Mapping[str, Array]) -> dict[str, Array]:
        qparams: QParams = banks.choose(bank, chosen)
        return sums_of(quantize.apply(model, variables, qparams, held.images), held)

    (count,) = {len(places) for places in chosen.values()}
    if count == 1:  # without the axis that makes other convolutions of them
        found = one({path: places[0] for path, places in chosen.items()})
        return jax.tree.map(lambda value: value[None], found)
    return jax.vmap(one)(chosen)


def hold(
    model: nn.Module, variables: Variables, batches: Sequence[Batch], teacher: np.ndarray
) -> list[Held]:
    """Held-out batches with what policies are compared with.

    Args:
      model: the student.
      variables: float.
      batches: with "image", "label" and "mask"; the last may be padded.
      teacher: [examples, classes], the teacher's logits on what is not padded, in order.
    """
    found, done = [], 0
    for batch in batches:
        mask = np.asarray(batch["mask"])
        count = int(mask.sum())
        logits = np.zeros((len(mask), teacher.shape[1]), np.float32)
        logits[:count] = teacher[done : done + count]
        done += count
        held = Held(
            images=jnp.asarray(batch["image"]),
            labels=jnp.asarray(batch["label"]),
            mask=jnp.asarray(mask),
            teacher=jnp.asarray(logits),
            float_logits=quantize.predict(model, variables, {}, jnp.asarray(batch["image"])),
        )
        found.append(held)
    return found
