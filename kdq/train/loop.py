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
from kdq.train import together
from kdq.train.checkpoint import Checkpointer
from kdq.train.diagnose import NonFiniteError, first_nonfinite
from kdq.train.metrics_writer import MetricsWriter
from kdq.train.state import TrainState
from kdq.train.step import ask_teacher
from kdq.train.together import Program
from kdq.train.training import Training

OF_THE_STEP = ("grad_norm", "oscillating", "frozen")  # metrics that are no sums over examples
LOG_EVERY = 50  # steps between two reads of the metrics
LOG_LAG = 16  # of which so many are left for the next: the device stays busy meanwhile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The weights that did best on the validation split, and when."""

    weights: Weights
    step: int
    metrics: dict[str, float]  # on validation: "accuracy", "nll"
    peer: dict[str, Any] | None = None  # its "params" and "model_state", where there is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """What training ended with."""

    last: Weights
    last_step: int
    selected: Selection
    seconds: float  # of training and validation, over all the processes that took part
    # Of compiling for both, apart; None: it went on from a checkpoint of a version that did not
    # tell, whose part of `seconds` has it.
    compile_seconds: float | None


def is_better(metrics: dict[str, float], than: dict[str, float]) -> bool:
    """More accurate on validation; between equals, the lower negative log-likelihood."""
    return (metrics["accuracy"], -metrics["nll"]) > (than["accuracy"], -than["nll"])


def fit(
    task: Training,
    state: TrainState,
    workdir: Path,
    *,
    checkpoint_seconds: float = 30.0,
    on_step: Callable[[int], None] = lambda step: None,
    tensorboard: bool = False,
) -> Fit:
    """Trains from `state`, or from the newest checkpoint in `workdir`, to `task.steps`.

    A run that was killed and is started again ends with the parameters of one that was not, on
    other devices too. Of several processes each calls this, and gets the whole weights.

    Args:
      task: what to train.
      state: the state before the first step.
      workdir: holds "checkpoints/" and "metrics.jsonl".
      checkpoint_seconds: least time between two checkpoints; they fall on validations.
      on_step: called with the number of steps taken, for progress.
      tensorboard: whether "tensorboard/" is to have the metrics as events, too.

    Raises:
      NonFiniteError: a loss or gradient was NaN or infinite; says at which step, and where first.
    """
    (found,) = fit_together(
        [task],
        [state],
        [workdir],
        checkpoint_seconds=checkpoint_seconds,
        on_step=on_step,
        tensorboard=tensorboard,
    )
    if isinstance(found, NonFiniteError):
        raise found
    return found


def fit_together(
    tasks: Sequence[Training],
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

    Raises ValueError for tasks that are not alike.
    """
    with contextlib.ExitStack() as stack:
        given = zip(tasks, states, workdirs, strict=True)
        runs = [stack.enter_context(_Run(*one)) for one in given]
        _resume(runs)
        program = together.program_of(tasks, states)
        _Loop(runs, program, checkpoint_seconds, on_step).to_the_end(tensorboard)
        return [run.error or run.fit() for run in runs]


class _Run:
    """What one seed has to itself: data, curve, selection and checkpoints."""

    def __init__(self, task: Training, state: TrainState, workdir: Path):
        self.task, self.layout, self.workdir = task, task.layout, workdir
        self.state = task.layout.place(state)
        self.step, self.seconds = 0, 0.0
        self.compile_seconds: float | None = 0.0
        self.best: dict[str, Any] = _parts(self.state)
        self.best_record: dict[str, Any] | None = None
        self.batches = iterate(task.dataset)
        self.error: NonFiniteError | None = None

    def __enter__(self) -> "_Run":
        self.checkpointer = Checkpointer(self.workdir / "checkpoints")
        return self

    def __exit__(self, *error: Any) -> None:
        self.checkpointer.__exit__(*error)

    def saved(self, step: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """`(trees, record)` of the checkpoint of a step; None if that can't be read."""
        return self.checkpointer.read(step, {"state": self.state, "selected": self.best})

    def resume(self, step: int, trees: dict[str, Any], record: dict[str, Any]) -> None:
        self.step, self.state, self.best = step, trees["state"], trees["selected"]
        self.best_record, self.seconds = record["selected"], record["seconds"]
        self.compile_seconds = record.get("compile_seconds")
        self.batches.set_state(record["data"])
        self.checkpointer.drop_after(step)

    def save(self, step: int) -> None:
        record = {
            "selected": self.best_record,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "data": self.batches.get_state(),
        }
        self.checkpointer.save(step, {"state": self.state, "selected": self.best}, record)

    def took(self, seconds: float, compile_seconds: float) -> None:
        self.seconds += seconds
        if self.compile_seconds is not None:
            self.compile_seconds += compile_seconds

    def validate(self, step: int) -> dict[str, float]:
        """What the state scores; keeps the weights if they are the best so far."""
        metrics = self.task.validate(weights(self.state))
        if not np.isfinite(metrics["nll"]):
            raise NonFiniteError(f"NaN or infinity on validation after step {step}")
        if self.best_record is None or is_better(metrics, self.best_record["metrics"]):
            self.best = jax.tree.map(jax.numpy.copy, _parts(self.state))
            self.best_record = {"step": step, "metrics": metrics}
        return metrics

    def blame(self, step: int) -> str:
        """Where what halted the state at a step came from."""
        task, batch = self.task, self.layout.batch(self.task.dataset[step - 1])
        arguments = self.layout.place(task.teacher_arguments)
        taught = ask_teacher(task.teacher, arguments, self.state, batch, task.objective)
        place = first_nonfinite(task.model, self.state, batch, taught)
        return f"NaN or infinity at step {step}, first in {place}"

    def fit(self) -> Fit:
        self.checkpointer.wait()
        return Fit(
            last=self.layout.fetch(weights(self.state)),
            last_step=self.task.steps,
            selected=Selection(
                weights=self.layout.fetch(_weights(self.state, self.best)),
                peer=self.layout.fetch(self.best.get("peer")),
                **self.best_record,
            ),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
        )


def _resume(runs: Sequence[_Run]) -> None:
    """From the newest checkpoint that all have and that can be read of all."""
    while common := set.intersection(*(set(run.checkpointer.steps()) for run in runs)):
        step = max(common)
        found = [run.saved(step) for run in runs]
        if None not in found:
            for run, (trees, record) in zip(runs, found, strict=True):
                run.resume(step, trees, record)
            return


class _Loop:
    """The steps of runs that are at the same one."""

    def __init__(
        self,
        runs: Sequence[_Run],
        program: Program,
        checkpoint_seconds: float,
        on_step: Callable[[int], None],
    ):
        self.runs, self.program = runs, program
        self.checkpoint_seconds, self.on_step = checkpoint_seconds, on_step
        self.task, self.step = runs[0].task, runs[0].step
        self.state = program.join([run.state for run in runs])
        self.pending: list[tuple[int, Any]] = []

    def to_the_end(self, tensorboard: bool) -> None:
        with contextlib.ExitStack() as stack:
            self.writers = [
                stack.enter_context(
                    MetricsWriter(
                        run.workdir / "metrics.jsonl",
                        after_step=self.step,
                        events=run.workdir / "tensorboard" if tensorboard else None,
                    )
                )
                for run in self.runs
            ]
            self._take_steps()

    def _take_steps(self) -> None:
        task, self.watch = self.task, Stopwatch()
        saved_at = time.monotonic()
        while self.step < task.steps and not all(run.error for run in self.runs):
            batches = [next(run.batches) for run in self.runs]
            freeze_norm = self.step >= task.freeze_norm_at
            if self.step - 1 < task.freeze_norm_at <= self.step:
                self._log()  # before another program is compiled, what was begun is to be over
            self.state, metrics = self.program(self.state, batches, freeze_norm=freeze_norm)
            self.step += 1
            self.pending.append((self.step, metrics))
            self.on_step(self.step)
            if self.step % LOG_EVERY == 0:
                self._log(keep=LOG_LAG)
            if self.step % task.eval_every == 0 or self.step == task.steps:
                self._log()
                self._validate()
                due = processes.agree(time.monotonic() - saved_at >= self.checkpoint_seconds)
                if due or self.step == task.steps:
                    self._note_time()
                    for run in self.runs:
                        if not run.error:
                            run.save(self.step)
                    saved_at = time.monotonic()
        self._note_time()

    def _note_time(self) -> None:
        """Gives each run its share of the time since this was last done."""
        seconds, compile_seconds = self.watch.working, self.watch.compiling
        self.watch = Stopwatch()
        for run in self.runs:
            run.took(seconds / len(self.runs), compile_seconds / len(self.runs))

    def _log(self, keep: int = 0) -> None:
        ready = self.pending[: len(self.pending) - keep]
        self.pending = self.pending[len(ready) :]
        for step, sums in jax.device_get(ready):
            for run, writer, own in zip(
                self.runs, self.writers, self.program.split(sums), strict=True
            ):
                if run.error:
                    continue
                if np.isfinite(own["loss"]) and np.isfinite(own["grad_norm"]):
                    writer.write(step, _means(own))
                else:
                    self._share()
                    run.error = NonFiniteError(run.blame(step))

    def _validate(self) -> None:
        self._share()
        for run, writer in zip(self.runs, self.writers, strict=True):
            if run.error:
                continue
            try:
                metrics = run.validate(self.step)
            except NonFiniteError as error:
                run.error = error
            else:
                writer.write(self.step, {f"validation_{k}": v for k, v in metrics.items()})

    def _share(self) -> None:
        """Gives each run its own state."""
        for run, state in zip(self.runs, self.program.split(self.state), strict=True):
            run.state = state


def _parts(state: TrainState) -> dict[str, Any]:
    """What makes up the weights, finished: as they are evaluated, packed and started from."""
    variables, _ = quantize.finish(state.variables, state.quantizers)
    return {
        "params": variables["params"],
        "model_state": state.model_state,
        "scales": state.scales,
        **({"peer": state.peer} if state.peer else {}),
    }


def weights(state: TrainState) -> Weights:
    """What a state evaluates, packs and hands on as."""
    return _weights(state, _parts(state))


def _weights(state: TrainState, parts: dict[str, Any]) -> Weights:
    qparams = quantize.plain(quantize.replace_scales(state.qparams, parts["scales"]))
    return Weights(variables={"params": parts["params"], **parts["model_state"]}, qparams=qparams)


def _means(sums: dict[str, Any]) -> dict[str, float]:
    """Masked sums of one step as means; "correct" becomes "accuracy"."""
    count = float(sums["count"])
    whole = {k: float(sums[k]) for k in OF_THE_STEP if k in sums}
    means = {k: float(v) / count for k, v in sums.items() if k not in (*OF_THE_STEP, "count")}
    means["accuracy"] = means.pop("correct")
    return {**means, **whole}
