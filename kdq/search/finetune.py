"""Policies judged after a short training: what calibration alone says of low bits can mislead."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import flax.linen as nn
import jax
import numpy as np

from kdq import quantize
from kdq.quantize.network import Weights
from kdq.search import bank as banks
from kdq.search.evaluate import OBJECTIVES, WORST, Evaluator, Held, means, sums_of
from kdq.train import loop
from kdq.train.state import TrainState
from kdq.train.training import Plan, Training
from kdq.types import QParams, Variables


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
        """Returns the scores of a policy after it was trained.

        Args:
          policy: the place of a choice for each layer.
          kept: of each of `distilled`, whether it counts.
        """
        student = self.evaluator
        chosen = dict(zip(student.choices, np.asarray(policy, np.int32), strict=True))
        qparams = banks.choose(student.bank, chosen)
        variables, qparams = quantize.prepare(student.variables, qparams, self.method)
        plan, state = self.begin(Weights(variables=variables, qparams=qparams))
        left_out = [name for name, keep in zip(self.distilled, kept, strict=True) if not keep]
        plan = dataclasses.replace(plan, training=without_terms(plan.training, left_out))
        state = loop.take_steps(plan, state)
        if bool(state.halted):
            return dict.fromkeys(OBJECTIVES, WORST)
        trained = loop.weights(state)
        return score(student.model, trained.variables, trained.qparams, student.held)


def without_terms(training: Training, names: Sequence[str]) -> Training:
    """Returns the training with the weight of some terms 0."""
    terms = tuple(
        term.replace(weight=term.weight.replace(values=0 * term.weight.values))
        if term.name in names
        else term
        for term in training.objective.terms
    )
    return training.replace(objective=training.objective.replace(terms=terms))


def score(
    model: nn.Module, variables: Variables, qparams: QParams, held: Sequence[Held]
) -> dict[str, float]:
    """Returns the scores of a quantized model by objective."""
    sums = [_sums(model, variables, qparams, batch) for batch in held]
    return {name: float(value) for name, value in means(sums).items()}


@partial(jax.jit, static_argnames=("model",))
def _sums(model: nn.Module, variables: Variables, qparams: QParams, held: Held):
    return sums_of(quantize.apply(model, variables, qparams, held.images), held)
