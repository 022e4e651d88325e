"""Where the time of a training step goes, from a trace of the real loop."""

import dataclasses
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from kdq import lock
from kdq.config import ConfigError, Experiment, parents, unknown
from kdq.experiment import runner
from kdq.experiment.arm import ArmRun
from kdq.experiment.context import Context
from kdq.experiment.progress import Progress
from kdq.quantize.network import Weights
from kdq.train import loop
from kdq.train.step import train_step

WARM_UP = 10  # steps before the trace: the first compiles
STEP = "jit_train_step"  # what XLA calls the compiled step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Milliseconds a step; operations run side by side, so that theirs can add up to more."""

    step: float  # of the loop
    inside: float  # of it, from the first operation of the compiled step to its last
    costs: Mapping[str, float]  # of operations by what they are of, the dearest first
    trace: Path  # for TensorBoard's profile plugin, xprof or Perfetto

    @property
    def outside(self) -> float:
        """The share of the loop's time between one compiled step and the next."""
        return 1 - self.inside / self.step


def profile(
    experiment: Experiment,
    workdir: str | Path,
    arm: str,
    *,
    seed: int,
    steps: int = 50,
    progress: Progress | None = None,
) -> Profile:
    """Traces so many steps of an arm's training; what the arm needs is run first, and kept.

    Raises ConfigError for an arm that does not train for so long.
    """
    if arm not in experiment.arms:
        raise ConfigError(unknown("arm", arm, experiment.arms))
    if not experiment.arms[arm].epochs:
        raise ConfigError(f"config.arms.{arm}.epochs=0: it is not trained")
    workdir, last = Path(workdir), WARM_UP + steps
    folder = workdir / "profile" / arm

    def on_step(step: int) -> None:
        if step == WARM_UP:
            jax.profiler.start_trace(str(folder), profiler_options=options)

    def stop(_: Weights) -> dict[str, float]:
        jax.profiler.stop_trace()  # here the loop has waited for the last step
        return {metric.name: 0.0 for metric in plan.training.objective.task.metrics}

    with lock.hold(workdir):
        if needs := parents(experiment, arm):
            runner.run(experiment, workdir, arms=needs, progress=progress)
        started = ArmRun(Context(experiment, workdir), arm, seed)
        variables, _ = started.start()
        started.weights, _ = started.calibrate(variables)
        plan, state = started.make_plan()
        if plan.steps < last:
            raise ConfigError(
                f"arm {arm!r} trains for {plan.steps} steps: expected {last}, {WARM_UP} of them to "
                "warm up"
            )
        compiled = train_step.lower(plan.training, state, plan.dataset[0]).compile()
        names = names_of(compiled.as_text())
        folder.mkdir(parents=True, exist_ok=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows down what it looks at
        plan = dataclasses.replace(plan, steps=last, eval_every=last, validate=stop)
        with tempfile.TemporaryDirectory() as scratch:
            loop.fit(plan, state, Path(scratch), on_step=on_step)
    return read(max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime), names)


def read(trace: Path, names: Mapping[str, str]) -> Profile:
    """Reads a profile from a trace; `names` are of operations."""
    spans: dict[Any, tuple[float, float]] = {}  # of runs of the step
    costs: dict[str, float] = defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and stats.get("hlo_module", "").startswith(STEP):
                    op, run = stats["hlo_op"], stats.get("run_id")
                    costs[names.get(op, op)] += event.duration_ns / 1e6
                    start, stop = event.start_ns, event.start_ns + event.duration_ns
                    first, last = spans.get(run, (start, stop))
                    spans[run] = min(first, start), max(last, stop)
    if not spans:
        raise RuntimeError(f"{trace} has no operation of {STEP}: does the device have a profiler?")
    starts, stops = zip(*spans.values(), strict=True)
    steps = len(spans)
    dearest = sorted(((name, ms / steps) for name, ms in costs.items()), key=lambda item: -item[1])
    return Profile(
        step=(max(stops) - min(starts)) / 1e6 / steps,
        inside=covered(spans.values()) / 1e6 / steps,
        costs=dict(dearest),
        trace=trace,
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def names_of(program: str) -> dict[str, str]:
    """Returns the names of a program's operations, from XLA's text; a fusion has its dearest's."""
    names, within, computation = {}, {}, ""
    for line in program.splitlines():
        if opened := re.match(r"\s*(?:ENTRY )?%(\S+) \(.*\{$", line):
            computation = opened[1]
        if not (operation := re.match(r"\s*(?:ROOT )?%(\S+) = ", line)):
            continue
        name = re.search(r'op_name="([^"]+)"', line)
        called = re.search(r"calls=%([\w.-]+)", line)
        if called and called[1] in within:
            names[operation[1]] = within[called[1]]
        elif name:
            names[operation[1]] = _readable(name[1])
        if name and (computation not in within or re.search(r" (convolution|dot)\(", line)):
            within[computation] = _readable(name[1])
    return names


def _readable(name: str) -> str:
    """Makes "backward conv_1/dot" of "jit(train_step)/transpose(jvp(CNN))/conv_1/dot"."""
    name = name.removeprefix("jit(train_step)/")
    way = "backward" if "transpose(" in name else "forward" if "jvp(" in name else "other"
    parts = [part for part in name.split("/") if "(" not in part]
    return f"{way} {'/'.join(parts)}"
