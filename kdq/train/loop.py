"""The loop: steps, validations, checkpoints. Every arm that trains goes through `fit`."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdq import processes, quantize
from kdq.data import iterate
from kdq.quantize.network import Weights
from kdq.stopwatch import Stopwatch
from kdq.tasks.base import improves
from kdq.train import together
from kdq.train.checkpoint import Checkpointer
from kdq.train.metrics_writer import MetricsWriter
from kdq.train.step import NonFiniteError, first_nonfinite, train_step
from kdq.train.training import Plan, TrainState
from kdq.types import Mean, Metrics

LOG_EVERY = 50  # steps between two reads of the metrics
LOG_LAG = 16  # of which so many are left for the next: the device stays busy meanwhile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The weights that did best on the validation split, and when."""

    weights: Weights
    step: int
    metrics: dict[str, float]  # of the task, on validation
    peer: dict[str, Any] | None = None  # its "params" and "model_state", where there is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """The end of a training."""

    last: Weights
    last_step: int
    selected: Selection
    seconds: float  # of training and validation, over all the processes that took part
    # Of compiling for both, apart; None: it went on from a checkpoint of a version that did not
    # tell, whose part of `seconds` has it.
    compile_seconds: float | None


def fit(plan: Plan, state: TrainState, workdir: Path, **options: Any) -> Fit:
    """Trains from `state`, or from the newest checkpoint in `workdir`, to `plan.steps`.

    A run that was killed and is started again ends with the parameters of one that was not, on
    other devices too. Every process calls this; each receives the full weights.

    From the state before the first step; `workdir` holds "checkpoints/" and "metrics.jsonl", and
    the options are those of `fit_together`. NonFiniteError for a loss or gradient that was NaN or
    infinite, which says at which step, and where first.
    """
    (result,) = fit_together([plan], [state], [workdir], **options)
    if isinstance(result, NonFiniteError):
        raise result
    return result


def fit_together(
    plans: Sequence[Plan],
    states: Sequence[TrainState],
    workdirs: Sequence[Path],
    *,
    checkpoint_seconds: float = 30.0,
    on_step: Callable[[int], None] = lambda step: None,
    tensorboard: bool = False,
) -> list[Fit | NonFiniteError]:
    """`fit` of several seeds of one arm as one program, see `kdq.train.together`.

    Each has its own checkpoints and curve, and ends as it would by itself but for rounding. What
    one fails with is returned in its place, and the others go on. Seeds that were cut off at
    different steps resume from the newest one that all of them have.

    Args:
      plans: of the seeds, alike in all but seed, data and weights: else ValueError.
      states: theirs before the first step.
      workdirs: each holds "checkpoints/" and "metrics.jsonl" of its seed.
      checkpoint_seconds: least time between two checkpoints; they fall on validations.
      on_step: called with the number of steps taken, for progress.
      tensorboard: whether "tensorboard/" is to have the metrics as events, too.
    """
    with contextlib.ExitStack() as stack:
        seeds = []
        for plan, state, workdir in zip(plans, states, workdirs, strict=True):
            checkpointer = stack.enter_context(Checkpointer(workdir / "checkpoints"))
            seeds.append(_Seed(plan, plan.training.layout.place(state), checkpointer))
        # Back to the newest checkpoint that all have and that can be read of all.
        while common := set.intersection(*(set(seed.checkpointer.steps()) for seed in seeds)):
            step = max(common)
            contents = [seed.checkpointer.read(step, seed.trees) for seed in seeds]
            if None not in contents:
                for seed, (trees, record) in zip(seeds, contents, strict=True):
                    seed.resume(step, trees, record)
                break
        trainer = Trainer(seeds, checkpoint_seconds, on_step)
        for seed, workdir in zip(seeds, workdirs, strict=True):
            events = workdir / "tensorboard" if tensorboard else None
            writer = MetricsWriter(workdir / "metrics.jsonl", after_step=seed.step, events=events)
            seed.writer = stack.enter_context(writer)
        trainer.run()
        return [seed.error or seed.finish() for seed in seeds]


@dataclasses.dataclass
class _Seed:
    """One seed's own part of a run."""

    plan: Plan
    state: TrainState
    checkpointer: Checkpointer
    writer: MetricsWriter | None = None
    step: int = 0
    seconds: float = 0.0
    compile_seconds: float | None = 0.0
    best_record: dict[str, Any] | None = None  # "step" and "metrics" of the selection
    error: NonFiniteError | None = None

    def __post_init__(self):
        self.batches = iterate(self.plan.dataset)
        self.best = _parts(self.state)  # the selection

    @property
    def trees(self) -> dict[str, Any]:
        return {"state": self.state, "selected": self.best}

    def save(self) -> None:
        record = {
            "selected": self.best_record,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "data": self.batches.get_state(),
        }
        self.checkpointer.save(self.step, self.trees, record)

    def resume(self, step: int, trees: dict[str, Any], record: dict[str, Any]) -> None:
        self.step, self.state, self.best = step, trees["state"], trees["selected"]
        self.best_record, self.seconds = record["selected"], record["seconds"]
        self.compile_seconds = record.get("compile_seconds")
        self.batches.set_state(record["data"])
        self.checkpointer.drop_after(step)

    def finish(self) -> Fit:
        self.checkpointer.wait()
        fetch = self.plan.training.layout.fetch
        return Fit(
            last=fetch(weights(self.state)),
            last_step=self.plan.steps,
            selected=Selection(
                weights=fetch(_weights(self.state, self.best)),
                peer=fetch(self.best.get("peer")),
                **self.best_record,
            ),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
        )


class Trainer:
    """Takes the steps of seeds that are at the same one."""

    def __init__(
        self, seeds: Sequence[_Seed], checkpoint_seconds: float, on_step: Callable[[int], None]
    ):
        self._seeds, self._plan, self._step = seeds, seeds[0].plan, seeds[0].step
        self._checkpoint_seconds, self._on_step = checkpoint_seconds, on_step
        states = [seed.state for seed in seeds]
        self._program = together.make_program([seed.plan for seed in seeds], states)
        self._state = self._program.join(states)
        self._pending: list[tuple[int, Metrics]] = []

    def run(self) -> None:
        """Trains to the last step, or until all seeds have failed."""
        plan, self._watch = self._plan, Stopwatch()
        saved_at = time.monotonic()
        while self._step < plan.steps and not all(seed.error for seed in self._seeds):
            batches = [next(seed.batches) for seed in self._seeds]
            freeze_norm = self._step >= plan.freeze_norm_at
            if freeze_norm and self._step - 1 < plan.freeze_norm_at:
                self._log()  # before another program is compiled, what was begun is to be over
            self._state, metrics = self._program(self._state, batches, freeze_norm=freeze_norm)
            self._step += 1
            self._pending.append((self._step, metrics))
            self._on_step(self._step)
            if self._step % LOG_EVERY == 0:
                self._log(keep=LOG_LAG)
            is_last = self._step == plan.steps
            if self._step % plan.eval_every == 0 or is_last:
                self._log()
                self._validate()
                due = time.monotonic() - saved_at >= self._checkpoint_seconds
                if processes.agree(due) or is_last:
                    self._note_time()
                    for seed in self._seeds:
                        if not seed.error:
                            seed.step = self._step
                            seed.save()
                    saved_at = time.monotonic()
        self._note_time()

    def _log(self, keep: int = 0) -> None:
        """Writes the metrics of the steps that are over, all but the newest `keep`.

        As numbers, with the primary metric in place of its scores.
        """
        primary = self._plan.training.objective.task.primary
        double = lambda x: np.asarray(x, np.float64)
        divide = lambda x: double(x.total) / double(x.count) if isinstance(x, Mean) else double(x)
        ready = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(ready) :]
        for step, metrics in jax.device_get(ready):
            for seed, totals in zip(self._seeds, self._program.split(metrics), strict=True):
                if seed.error:
                    continue
                values = {name: divide(x) for name, x in totals.items()}
                score = primary.from_means(*(values.pop(name) for name in primary.scores))
                values = {name: float(x) for name, x in values.items()} | {primary.name: score}
                if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
                    seed.writer.write(step, values)
                    continue
                self._share_state()
                training = seed.plan.training.place()
                batch = training.layout.batch(seed.plan.dataset[step - 1])
                place = first_nonfinite(training, seed.state, batch)
                seed.error = NonFiniteError(f"NaN or infinity at step {step}, first in {place}")

    def _validate(self) -> None:
        """Scores each seed's weights, and keeps those that are the best so far."""
        self._share_state()
        task = self._plan.training.objective.task
        losses = [m.name for m in task.metrics if not m.higher_is_better]
        for seed in self._seeds:
            if seed.error:
                continue
            metrics = seed.plan.validate(weights(seed.state))
            if not all(np.isfinite(metrics[name]) for name in losses):
                seed.error = NonFiniteError(
                    f"NaN or infinity on validation after step {self._step}"
                )
                continue
            best = seed.best_record
            if best is None or improves(task, metrics, best["metrics"]):
                seed.best = jax.tree.map(jax.numpy.copy, _parts(seed.state))
                seed.best_record = {"step": self._step, "metrics": metrics}
            seed.writer.write(self._step, {f"validation_{k}": v for k, v in metrics.items()})

    def _note_time(self) -> None:
        """Gives each seed its share of the time since this was last done."""
        seconds, compile_seconds = self._watch.working, self._watch.compiling
        self._watch = Stopwatch()
        for seed in self._seeds:
            seed.seconds += seconds / len(self._seeds)
            if seed.compile_seconds is not None:
                seed.compile_seconds += compile_seconds / len(self._seeds)

    def _share_state(self) -> None:
        """Gives each seed its own state."""
        for seed, state in zip(self._seeds, self._program.split(self._state), strict=True):
            seed.state = state


def take_steps(plan: Plan, state: TrainState) -> TrainState:
    """Returns the state after `plan.steps` steps without validations, checkpoints or a curve."""
    for step in range(plan.steps):
        training = plan.training.replace(freeze_norm=step >= plan.freeze_norm_at)
        state, _ = train_step(training, state, plan.dataset[step])
    return state


def weights(state: TrainState) -> Weights:
    """Returns the weights of a state as they are evaluated, packed and handed on."""
    return _weights(state, _parts(state))


def _parts(state: TrainState) -> dict[str, Any]:
    """Returns the arrays that make up the weights, finished."""
    variables, _ = quantize.finish(state.variables, state.quantizers)
    parts = {
        "params": variables["params"],
        "model_state": state.model_state,
        "scales": state.scales,
    }
    teacher = state.teacher
    peer = {"params": teacher.params, "model_state": teacher.model_state}
    return parts | ({"peer": peer} if teacher.learns else {})


def _weights(state: TrainState, parts: dict[str, Any]) -> Weights:
    qparams = quantize.plain(quantize.replace_scales(state.qparams, parts["scales"]))
    return Weights(variables={"params": parts["params"], **parts["model_state"]}, qparams=qparams)
