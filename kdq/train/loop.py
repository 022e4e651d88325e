"""The loop: steps, validations, checkpoints. Every arm that trains goes through `fit`."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import numpy as np
import optax

from kdq import processes, quantize
from kdq.data import iterate
from kdq.distill.teacher import Peer, Teacher
from kdq.schema import AT_ONCE, Compute
from kdq.train.checkpoint import Checkpointer
from kdq.train.diagnose import NonFiniteError, first_nonfinite
from kdq.train.metrics_writer import MetricsWriter
from kdq.train.objective import Objective
from kdq.train.regime import Regime
from kdq.train.sharding import ONE_DEVICE, Layout
from kdq.train.state import TrainState
from kdq.train.step import ask_teacher, train_step
from kdq.types import QParams, Variables

OF_THE_STEP = ("grad_norm", "oscillating", "frozen")  # metrics that are no sums over examples
LOG_EVERY = 50  # steps between two reads of the metrics
LOG_LAG = 16  # of which so many are left for the next: the device stays busy meanwhile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What a model computes with: float variables, and the quantizers ({} for none)."""

    variables: Variables
    qparams: QParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The weights that did best on the validation split, and when."""

    weights: Weights
    step: int
    metrics: dict[str, float]  # on validation: "accuracy", "nll"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """What training ended with."""

    last: Weights
    last_step: int
    selected: Selection
    seconds: float  # of training and validation, over all the processes that took part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, by whom, on what. `teacher` and the state's quantizers are optional."""

    model: nn.Module
    optimizer: optax.GradientTransformation
    objective: Objective
    dataset: grain.MapDataset  # endless; element i is the batch of step i, or this process's rows
    steps: int
    eval_every: int
    validate: Callable[[Weights], dict[str, float]]  # -> "accuracy" and "nll" on validation
    teacher: Teacher | Peer | None = None
    teacher_arguments: Any = None
    regime: Regime | None = None
    freeze_norm_at: float = math.inf  # step from which on batch norm keeps its statistics
    layout: Layout = ONE_DEVICE  # where the arrays are, those that `validate` gets as well
    compute: Compute = AT_ONCE  # how a step is computed


def is_better(metrics: dict[str, float], than: dict[str, float]) -> bool:
    """More accurate on validation; between equals, the lower negative log-likelihood."""
    return (metrics["accuracy"], -metrics["nll"]) > (than["accuracy"], -than["nll"])


def fit(
    task: Task,
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
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        events = workdir / "tensorboard" if tensorboard else None
        run = _Run(task, state, workdir, checkpointer, checkpoint_seconds, on_step, events)
        with run.writer:
            return run.to_the_end()


class _Run:
    """The moving parts of `fit`."""

    def __init__(self, task, state, workdir, checkpointer, checkpoint_seconds, on_step, events):
        self.task, self.layout = task, task.layout
        self.objective, self.regime = self.layout.copy((task.objective, task.regime))
        self.teacher_arguments = self.layout.place(task.teacher_arguments)
        self.checkpointer = checkpointer
        self.checkpoint_seconds = checkpoint_seconds
        self.on_step = on_step
        self.state = self.layout.place(state)
        self.best: dict[str, Any] = _parts(self.state)
        self.best_record: dict[str, Any] | None = None
        self.seconds_before = 0.0
        self.batches = iterate(task.dataset)
        self.step = self._resume()
        self.pending: list[tuple[int, Any]] = []
        path = workdir / "metrics.jsonl"
        self.writer = MetricsWriter(path, after_step=self.step, events=events)

    def _resume(self) -> int:
        found = self.checkpointer.restore({"state": self.state, "selected": self.best})
        if found is None:
            return 0
        step, trees, record = found
        self.state, self.best = trees["state"], trees["selected"]
        self.best_record, self.seconds_before = record["selected"], record["seconds"]
        self.batches.set_state(record["data"])
        return step

    def to_the_end(self) -> Fit:
        task, start = self.task, time.monotonic()
        seconds = lambda: self.seconds_before + time.monotonic() - start
        saved_at = start
        while self.step < task.steps:
            self.state, metrics = train_step(
                self.state,
                self.teacher_arguments,
                self.layout.batch(next(self.batches)),
                model=task.model,
                teacher=task.teacher,
                objective=self.objective,
                optimizer=task.optimizer,
                regime=self.regime,
                freeze_norm=self.step >= task.freeze_norm_at,
                layout=self.layout,
                compute=task.compute,
            )
            if self.layout.must_wait:
                jax.block_until_ready(metrics)
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
                    self._save(seconds())
                    saved_at = time.monotonic()
        self.checkpointer.wait()
        return Fit(
            last=self.layout.fetch(weights(self.state)),
            last_step=self.step,
            selected=Selection(
                weights=self.layout.fetch(_weights(self.state, self.best)), **self.best_record
            ),
            seconds=seconds(),
        )

    def _log(self, keep: int = 0) -> None:
        ready = self.pending[: len(self.pending) - keep]
        self.pending = self.pending[len(ready) :]
        for step, sums in jax.device_get(ready):
            if not (np.isfinite(sums["loss"]) and np.isfinite(sums["grad_norm"])):
                raise NonFiniteError(self._blame(step))
            self.writer.write(step, _means(sums))

    def _blame(self, step: int) -> str:
        task, batch = self.task, self.layout.batch(self.task.dataset[step - 1])
        taught = ask_teacher(
            task.teacher, self.teacher_arguments, self.state, batch, self.objective
        )
        place = first_nonfinite(task.model, self.state, batch, taught)
        return f"NaN or infinity at step {step}, first in {place}"

    def _validate(self) -> None:
        metrics = self.task.validate(weights(self.state))
        if not np.isfinite(metrics["nll"]):
            raise NonFiniteError(f"NaN or infinity on validation after step {self.step}")
        self.writer.write(self.step, {f"validation_{k}": v for k, v in metrics.items()})
        if self.best_record is None or is_better(metrics, self.best_record["metrics"]):
            self.best = jax.tree.map(jax.numpy.copy, _parts(self.state))
            self.best_record = {"step": self.step, "metrics": metrics}

    def _save(self, seconds: float) -> None:
        record = {
            "selected": self.best_record,
            "seconds": seconds,
            "data": self.batches.get_state(),
        }
        self.checkpointer.save(self.step, {"state": self.state, "selected": self.best}, record)


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
