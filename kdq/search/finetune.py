"""Policies judged after a short training: what calibration alone says of low bits can mislead."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from kdq import quantize
from kdq.quantize.network import Weights
from kdq.search import bank as banks
from kdq.search.evaluate import Evaluator, score
from kdq.search.objectives import OBJECTIVES, WORST
from kdq.train import loop
from kdq.train.training import Plan, Training, TrainState


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
        qparams = banks.choose(student.bank, student.chosen(policy))
        variables, qparams = quantize.prepare(student.variables, qparams, self.method)
        plan, state = self.begin(Weights(variables=variables, qparams=qparams))
        left_out = [name for name, keep in zip(self.distilled, kept, strict=True) if not keep]
        plan = dataclasses.replace(plan, training=without_terms(plan.training, left_out))
        state = loop.take_steps(plan, state)
        if bool(state.halted):
            return dict.fromkeys(OBJECTIVES, WORST)
        return score(student.network, loop.weights(state), student.task, student.held)


def without_terms(training: Training, names: Sequence[str]) -> Training:
    """Returns the training with the weight of some terms 0."""
    terms = tuple(
        term.replace(weight=term.weight.replace(values=0 * term.weight.values))
        if term.name in names
        else term
        for term in training.objective.terms
    )
    return training.replace(objective=training.objective.replace(terms=terms))
