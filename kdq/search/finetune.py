"""Policies judged after a short training: what calibration alone says of low bits can mislead."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from kdq import quantize
from kdq.quantize.network import Weights
from kdq.search import bank as banks
from kdq.search.evaluate import Evaluator, score
from kdq.search.objectives import OBJECTIVES, WORST
from kdq.train import loop
from kdq.train.state import TrainState
from kdq.train.step import train_step
from kdq.train.training import Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """Trains a policy for a few steps by the ordinary step, always on the same batches.

    Bits, and which terms of the recipe count, are data: all policies share one compiled step.
    """

    evaluator: Evaluator  # of the student
    begin: Callable[[Weights], tuple[Training, TrainState]]
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
        task, state = self.begin(Weights(variables=variables, qparams=qparams))
        task = without_terms(task, [n for n, k in zip(self.distilled, kept, strict=True) if not k])
        state = _train(task, state)
        if bool(state.halted):
            return dict.fromkeys(OBJECTIVES, WORST)
        return score(student.network, loop.weights(state), student.held)


def without_terms(task: Training, names: Sequence[str]) -> Training:
    """Returns the task with the weight of some terms 0."""
    terms = tuple(
        term.replace(weight=term.weight.replace(values=0 * term.weight.values))
        if term.name in names
        else term
        for term in task.objective.terms
    )
    return dataclasses.replace(task, objective=task.objective.replace(terms=terms))


def _train(task: Training, state: TrainState) -> TrainState:
    for step in range(task.steps):
        state, _ = train_step(
            state,
            task.teacher_arguments,
            task.dataset[step],
            model=task.model,
            teacher=task.teacher,
            objective=task.objective,
            optimizer=task.optimizer,
            regime=task.regime,
            freeze_norm=step >= task.freeze_norm_at,
            compute=task.compute,
        )
    return state
