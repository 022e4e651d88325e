"""Images a second of kdq's training steps, of its input pipeline and of its loop around the steps.

    python benchmarks/throughput.py --data_dir=data --out=throughput.json

Students, teachers, batches, losses and bits are those of configs/digits.py and
configs/fashion_mnist.py. Their arms take turns, in one process and on the same cores, with the same
step in PyTorch, eager and by torch.compile; a ratio is the median over rounds of the time of the
eager step of the same kind over the row's own, so more is faster. PyTorch is an extra
(pip install 'kdq[bench]', and g++ for torch.compile); without it kdq's rows stand alone.

A turn is several steps without a wait between them, as in training, after one that is not timed.
kdq's step does what PyTorch's does not: rates by schedule, the norm of the gradient and a check of
it, metrics. PyTorch's Adam is the fused one; its QAT is `torch_models.LearnedStep`. The machine has
to be quiet: where another program takes a core, PyTorch's threads wait for each other at each of
their loops, and its steps take up to 20 times as long.

The pipeline makes the batches of the arms, alone. The loop is `kdq.train.loop.fit`, from one of its
logs to a later one, so without what comes once (compiling, validations, checkpoints); beside it the
compiled step takes as many steps on one batch, or on the pipeline's.
"""

import dataclasses
import functools
import os
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from interleaved import publish, run

from kdq import config, data, models
from kdq.config import Experiment
from kdq.data import Source
from kdq.deploy.measure import latency
from kdq.distill.teacher import Model, Stored
from kdq.experiment import training
from kdq.experiment.inputs import Inputs
from kdq.experiment.progress import Progress
from kdq.experiment.quantized import quantized
from kdq.experiment.store import fresh_variables
from kdq.experiment.teaching import Teaching
from kdq.quantize.network import Weights
from kdq.train import loop
from kdq.train.loop import LOG_EVERY
from kdq.train.step import train_step
from kdq.train.training import Plan, TrainState

CONFIGS = Path(__file__).parents[1] / "configs"
# Of the images where the data set is not there.
SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1)}

OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 16, "Timed rounds of each table.")
MODELS = flags.DEFINE_multi_enum("models", list(SHAPES), list(SHAPES), "Configs to measure.")
DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where Fashion-MNIST is prepared; digits are where TFDS has its data."
)
THREADS = flags.DEFINE_integer("threads", 2, "Cores of the process, and threads of PyTorch.")
TURN = flags.DEFINE_float("turn_seconds", 0.05, "About how long kdq's float steps of a turn take.")

STEPS = 10_000  # of the schedules
# {kind of step: (arm of the config, whether the teacher's logits are cached)}
KINDS = {
    "fp32": ("student", False),
    "KD, live teacher": ("kd", False),
    "KD, cached logits": ("kd", True),
    "QAT W4A4": ("qat_w4a4", False),
    "QAD W4A4, live teacher": ("qad_w4a4_student", False),
    "QAD W4A4, cached logits": ("qad_w4a4_student", True),
}
IN_LOOP = ("fp32", "QAD W4A4, cached logits")  # kinds whose loop is measured

Take = Callable[[int], None]  # takes so many steps, to the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One config, with its data or random images in their place."""

    experiment: Experiment
    inputs: Inputs
    has_data: bool

    @property
    def title(self) -> str:
        """In words."""
        shape = "x".join(map(str, self.inputs.splits["train"].spec["image"].shape))
        images = "" if self.has_data else ", random images"
        return f"{self.experiment.data.name}, {shape}, batch {self.batch_size}{images}"

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return self.experiment.data.batch_size


def open_setting(name: str) -> Setting:
    """The config of that name."""
    fields = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    if name != "digits":
        fields.data.data_dir = DATA_DIR.value
    experiment = config.freeze(fields)
    inputs = Inputs(experiment)
    try:
        _ = inputs.splits
    except data.DataError as error:
        print(f"{name}: random images, since {error}", file=sys.stderr)
        inputs.splits = {"train": random_source(SHAPES[name])}
        return Setting(experiment=experiment, inputs=inputs, has_data=False)
    return Setting(experiment=experiment, inputs=inputs, has_data=True)


def random_source(shape: tuple[int, int, int], examples: int = 4096) -> Source:
    """Random images as a data set of ten classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, *shape), np.uint8)
    labels = rng.integers(0, 10, examples).astype(np.int32)
    return data.from_arrays(images, labels, name="random", classes=10)


def make_plan(setting: Setting, kind: str) -> tuple[Plan, TrainState]:
    """Returns an arm's plan and state as the runner has them; its teacher's weights are fresh."""
    experiment, inputs = setting.experiment, setting.inputs
    name, cached = KINDS[kind]
    arm = experiment.arms[name]
    built = {key: models.build(**fields) for key, fields in experiment.models.items()}
    image = np.zeros(inputs.image.shape, np.float32)
    fresh = lambda model, seed: fresh_variables(model, jax.random.key(seed), image)
    model = built[arm.model]
    start = Weights(variables=fresh(model, 0), qparams={})
    if arm.bits:
        images = inputs.calibration_batches()
        start, _ = quantized(
            experiment, arm, model, start.variables, images, guide=None, progress=Progress()
        )
    teaching = Teaching()
    if arm.teacher and cached:
        shape = (inputs.num_examples, len(inputs.splits["train"].facts["class_names"]))
        logits = 3 * np.random.default_rng(0).standard_normal(shape, np.float32)
        teaching = Teaching(teacher=Stored(), extra={"teacher_logits": logits})
    elif arm.teacher:
        teacher = built[experiment.arms[arm.teacher].model]
        weights = Weights(variables=fresh(teacher, 1), qparams={})
        teaching = Teaching(teacher=Model(teacher, weights))
    return training.make_plan(
        experiment,
        name,
        0,
        start,
        model=model,
        inputs=inputs,
        teaching=teaching,
        validate=lambda weights: {"accuracy": 0.0, "nll": 0.0},
        steps=STEPS,
    )


def kdq_take(plan: Plan, state: TrainState, batch: Callable[[], Any]) -> Take:
    """Returns steps of the plan as `fit` takes them, with the batches that it is given."""
    training = plan.training.place()
    state = jax.tree.map(jnp.copy, state)  # the step donates it

    def take(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = train_step(training, state, batch())
        jax.block_until_ready((state, metrics))

    return take


def in_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Returns the results of each turn, round by round, after one round that does not count."""
    measured: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(rounds + 1):
        for name in np.random.default_rng(round_).permutation(list(turns)):
            measured[name].append(turns[name]())
    return {name: np.array(results[1:]) for name, results in measured.items()}


def seconds_a_step(take: Take, count: int) -> float:
    """One turn."""
    take(1)
    start = time.perf_counter()
    take(count)
    return (time.perf_counter() - start) / count


def timing(seconds: np.ndarray, images: int) -> dict[str, float]:
    """A row's own figures."""
    median = float(np.median(seconds))
    return {"images_per_second": round(images / median), "milliseconds": round(1e3 * median, 3)}


def ratio(name: str, numbers: np.ndarray, digits: int = 3) -> dict[str, Any]:
    """The median of a ratio over the rounds, with its quartiles."""
    low, mid, high = (round(float(x), digits) for x in np.percentile(numbers, (25, 50, 75)))
    return {name: mid, f"{name}_quartiles": [low, high]}


def measure_steps(
    setting: Setting, torch_take: Callable[..., Take] | None
) -> dict[str, dict[str, Any]]:
    """Rows of the steps, and why those that fail do."""
    takes: dict[str, Take] = {}
    failures: dict[str, str] = {}
    for kind, arm in KINDS.items():
        plan, state = make_plan(setting, kind)
        batch = jax.device_put(plan.dataset[0])
        rows = {f"{kind}, kdq": kdq_take(plan, state, lambda batch=batch: batch)}
        for by, compiled in {"PyTorch eager": False, "torch.compile": True}.items():
            if not torch_take:
                continue
            try:
                take = torch_take(setting.experiment, *arm, batch, compiled=compiled)
                take(2)  # what is compiled
                rows[f"{kind}, {by}"] = take
            except Exception as error:  # what a peer raises is a result
                first = (str(error).splitlines() or [""])[0]
                failures[f"{kind}, {by}"] = f"fails: {type(error).__name__}: {first[:120]}"
        takes |= rows
        for take in rows.values():
            take(2)
    # As many steps in every turn, so that short steps are timed as long as a wait does not matter.
    seconds = statistics.median(seconds_a_step(takes["fp32, kdq"], 10) for _ in range(3))
    count = max(1, round(TURN.value / seconds))
    turns = {name: functools.partial(seconds_a_step, take, count) for name, take in takes.items()}
    measured = in_turns(turns, ROUNDS.value)
    rows_by_name: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        eager = measured.get(f"{kind}, PyTorch eager")
        for by in ("kdq", "PyTorch eager", "torch.compile"):
            name = f"{kind}, {by}"
            if name in failures:
                rows_by_name[name] = {"error": failures[name]}
            elif name in measured:
                rows_by_name[name] = timing(measured[name], setting.batch_size)
                if eager is not None and by != "PyTorch eager":
                    rows_by_name[name] |= ratio("times_eager", eager / measured[name])
    return rows_by_name


def measure_pipeline(setting: Setting, steps: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of the pipeline alone, over the training rate of the kinds that use such batches."""
    rows = {}
    for kind in IN_LOOP:
        batches = data.iterate(make_plan(setting, kind)[0].dataset)

        def take(count: int, batches=batches) -> None:
            for _ in range(count):
                next(batches)

        take(200)
        seconds = np.array([seconds_a_step(take, 300) for _ in range(ROUNDS.value)])
        row = timing(seconds, setting.batch_size)
        rows[f"batches of {kind}"] = {
            "batches_per_second": round(1 / float(np.median(seconds))),
            **row,
            "times_training": round(
                row["images_per_second"] / steps[f"{kind}, kdq"]["images_per_second"], 1
            ),
        }
    return rows


def loop_seconds(plan: Plan, state: TrainState, logs: int) -> float:
    """Seconds a step of `fit`, between two of its logs."""
    first, last = LOG_EVERY + 1, (logs + 1) * LOG_EVERY + 1
    marks = {}
    plan = dataclasses.replace(plan, steps=last, eval_every=last)

    def mark(step: int) -> None:
        if step in (first, last):
            marks[step] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        loop.fit(plan, jax.tree.map(jnp.copy, state), Path(folder), on_step=mark)
    return (marks[last] - marks[first]) / (last - first)


def measure_loop(setting: Setting, steps: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of the loop, with the share of its time that is outside of the compiled step."""
    rows = {}
    for kind in IN_LOOP:
        plan, state = make_plan(setting, kind)
        count = 300 / steps[f"{kind}, kdq"]["milliseconds"]  # of 0.3 seconds
        logs = max(1, round(count / LOG_EVERY))  # of long steps fewer, and fewer rounds
        batch, batches = jax.device_put(plan.dataset[0]), data.iterate(plan.dataset)
        fixed = kdq_take(plan, state, lambda batch=batch: batch)
        piped = kdq_take(plan, state, functools.partial(next, batches))
        turns = {
            "step": functools.partial(seconds_a_step, fixed, logs * LOG_EVERY),
            "step on the pipeline's batches": functools.partial(
                seconds_a_step, piped, logs * LOG_EVERY
            ),
            "loop": functools.partial(loop_seconds, plan, state, logs),
        }
        measured = in_turns(turns, ROUNDS.value if logs > 1 else max(2, ROUNDS.value // 4))
        for name, seconds in measured.items():
            row = timing(seconds, setting.batch_size)
            if name != "step":
                row |= ratio("share_outside", 1 - measured["step"] / seconds, 4)
            rows[f"{kind}, {name}"] = row
    return rows


def load_torch() -> Callable[..., Take] | None:
    """Returns the function that makes PyTorch's steps, if it is installed."""
    try:
        import torch_steps  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        print("PyTorch is not installed (pip install 'kdq[bench]'): kdq alone", file=sys.stderr)
        return None
    torch_steps.torch.set_num_threads(THREADS.value)
    return torch_steps.torch_take


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a table to the terminal."""
    print(title, file=sys.stderr)
    for name, row in rows.items():
        if "error" in row:
            print(f"  {name:46s} {row['error']}", file=sys.stderr)
            continue
        rest = dict(row)
        speed = f"{rest.pop('images_per_second'):>9,} images/s {rest.pop('milliseconds'):>9.3f} ms"
        more = "  ".join(f"{key} {value}" for key, value in rest.items())
        print(f"  {name:46s} {speed}  {more}", file=sys.stderr)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
    os.sched_setaffinity(0, latency.cores(THREADS.value))  # before XLA counts them
    load, torch_take = os.getloadavg()[0], load_torch()
    figures: dict[str, Any] = {}
    for name in MODELS.value:
        setting = open_setting(name)
        steps = measure_steps(setting, torch_take)
        tables = {"steps": steps}
        if setting.has_data:
            tables["pipeline"] = measure_pipeline(setting, steps)
            tables["loop"] = measure_loop(setting, steps)
        for table, rows in tables.items():
            show(f"{setting.title}: {table}", rows)
        figures[setting.title] = tables | {"models": dict(setting.experiment.models)}
    torch = sys.modules.get("torch")
    publish(
        figures,
        OUT.value,
        rounds=ROUNDS.value,
        threads=THREADS.value,
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY", ""),
        load_before=load,
        torch=torch.__version__ if torch else "not installed",
    )


if __name__ == "__main__":
    run(main)
