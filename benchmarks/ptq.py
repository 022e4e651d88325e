"""Seconds that each post-training method takes on two networks.

    python benchmarks/ptq.py --out=benchmarks/results/ptq.json
    python benchmarks/ptq.py --models=resnet20 --methods=gptq --methods=bias_correction

"calibrate, ..." is calibration alone, by observer: of activations and of weights, but that entropy,
which wants many values, leaves the weights to min-max. Every other line is one method with its
defaults, without the calibration or the folding before it. Weights are random; norms have the
statistics of the images, which are random too. W4A8.

The first run includes compilation. A second, in the same process, is timed if the first took less
than SECOND_BELOW seconds.

`adaround`, `brecq` and `teacher_guided` take a thousand steps a layer, a block or the network:
leave them out by `--methods` for a quick look.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from interleaved import publish, run

from kdq import models, quantize
from kdq.quantize.ptq.chain import AFTER, METHODS
from kdq.quantize.ptq.fold_batch_norm import fold_batch_norm
from kdq.quantize.ptq.reestimate import reestimate

SECOND_BELOW = 60.0  # seconds
BATCH, BITS, EVALUATE = 32, (4, 8), {"train": False}

MODELS = {
    "resnet20": ("ResNet-20 16/32/64, 32x32x3", 32, {"name": "resnet", "depth": 20}),
    # Plain, with batch norm and 3×3 convolutions throughout: no method has nothing to do. Its 512
    # channels are those of a ResNet-18's last stage, on 3×3 positions: XLA's CPU backend computes a
    # convolution of images smaller than its kernel 20 times slower.
    "cnn20m": (
        "CNN of 12 convolutions to 512 channels, 24x24x3",
        24,
        {
            "name": "cnn",
            "widths": (64, 128, 256, *[512] * 9),
            "strides": (2, 2, 2, *[1] * 9),
            "batch_norm": True,
        },
    ),
}
OBSERVERS = {
    "min_max": quantize.MinMax(),
    "mse": quantize.MSE(),
    "entropy": quantize.Entropy(),
}
CALIBRATIONS = {f"calibrate, {name}": name for name in OBSERVERS}
LINES = [*CALIBRATIONS, *METHODS]

OUT = flags.DEFINE_string("out", None, "JSON file for the figures.")
EXAMPLES = flags.DEFINE_integer("examples", 256, f"Images, in batches of {BATCH}.", lower_bound=64)
CHOSEN_MODELS = flags.DEFINE_multi_enum("models", list(MODELS), list(MODELS), "Models to measure.")
CHOSEN = flags.DEFINE_multi_enum("methods", LINES, LINES, "Lines to measure.")


class Subject(NamedTuple):
    """A network as it is before a method."""

    model: Any
    variables: Any
    folded: Any  # variables with folded norms
    batches: list[jax.Array]


def make_subject(side: int, fields: dict[str, Any]) -> Subject:
    """A random network whose norms fit the images, which are `side` pixels wide."""
    model = models.build(**fields, num_classes=10)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((EXAMPLES.value // BATCH, BATCH, side, side, 3), np.float32)
    batches = [jax.device_put(batch) for batch in images]
    variables = model.init(jax.random.key(0), batches[0])
    variables, _ = reestimate(model, variables, {}, batches)
    folded, _ = fold_batch_norm(model, variables, {}, batches)
    return Subject(model, variables, folded, batches)


def make_rules(observer: str) -> tuple[quantize.QuantizationRule, ...]:
    """W4A8 of every layer."""
    spec = quantize.TensorSpec
    of_weights = "min_max" if observer == "entropy" else observer
    return (
        quantize.QuantizationRule(
            path=".*",
            weights=spec(bits=BITS[0], granularity="per_channel", observer=OBSERVERS[of_weights]),
            activations=spec(bits=BITS[1], observer=OBSERVERS[observer]),
        ),
    )


def make_run(line: str, subject: Subject) -> Callable[[], Any]:
    """The work of a line; what comes before the method is done here, not there."""
    model, variables, folded, batches = subject
    rules = make_rules(CALIBRATIONS.get(line, "min_max"))
    if line in CALIBRATIONS:
        return lambda: quantize.calibrate(model, folded, rules, batches)
    # These are about norms that have something to do.
    start = variables if line in ("fold_batch_norm", "reestimate") else folded
    qparams = {}
    if line in AFTER:
        qparams = quantize.calibrate(model, start, rules, batches)
    run = functools.partial(METHODS[line], model, start, qparams, batches)
    return functools.partial(run, rules=rules) if line == "awq" else run


def seconds(run: Callable[[], Any]) -> float:
    """Returns the seconds that `run` takes until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return round(time.perf_counter() - start, 2)


def measure(line: str, subject: Subject) -> dict[str, float | None]:
    """Seconds of the first run and, if that was short, of the second."""
    run = make_run(line, subject)
    first = seconds(run)
    return {"first": first, "second": seconds(run) if first < SECOND_BELOW else None}


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # methods tell of each layer that they leave
    figures = {}
    for title, side, fields in map(MODELS.get, CHOSEN_MODELS.value):
        subject = make_subject(side, fields)
        parameters = models.count_parameters(subject.variables)
        print(f"{title}, {parameters:,} parameters, {EXAMPLES.value} examples", flush=True)
        print(f"  {'seconds':28s} {'first run':>10s} {'second':>10s}", flush=True)
        figures[title] = {"parameters": parameters, "seconds": {}}
        for line in CHOSEN.value:
            timing = figures[title]["seconds"][line] = measure(line, subject)
            second = "-" if timing["second"] is None else timing["second"]
            print(f"  {line:28s} {timing['first']:>10} {second:>10}", flush=True)
            if OUT.value:  # after each line: the last ones take long
                publish(figures, OUT.value, examples=EXAMPLES.value, batch=BATCH, bits="W4A8")


if __name__ == "__main__":
    run(main)
