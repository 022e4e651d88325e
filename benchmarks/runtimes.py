"""Latency of one network in every runtime, and how many times faster than float in ONNX Runtime.

    pip install -e '.[bench,litert]'
    python benchmarks/runtimes.py --out=benchmarks/results/runtimes.json
    python benchmarks/runtimes.py --models=cnn --bits=W4A8 --batches=64 --threads=1

All take turns in one process, on the same cores, in another order each round; medians. Weights and
images are random, which no runtime knows. What fails is listed with the reason. "inexact" is ONNX
Runtime as it comes, whose sums saturate on this processor if it has no VNNI. LiteRT computes one
example at a time.

The product of a vector and a 4096 by 4096 matrix is a dense layer whose weights alone are stored in
few bits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import linen as nn
from interleaved import publish, run, show

from kdq import deploy, models, quantize
from kdq.deploy import extras
from kdq.deploy.formats import litert
from kdq.deploy.measure import latency
from kdq.quantize.network import Weights

MODELS = {
    "mlp": {"name": "mlp", "widths": (1024, 1024)},
    "cnn": {"name": "cnn", "widths": (32, 64, 128)},
    "resnet": {"name": "resnet", "depth": 8, "widths": (16, 16, 32, 64)},
    "vit": {"name": "vit", "width": 64, "depth": 2},
}
WIDTH = 4096  # of the matrix
MATRIX = {
    "W8": quantize.TensorSpec(bits=8, granularity="per_channel"),
    "W4": quantize.TensorSpec(bits=4, granularity="per_channel"),
    "W4 in groups of 128": quantize.TensorSpec(bits=4, granularity="per_group", group_size=128),
    "W2 in groups of 128": quantize.TensorSpec(bits=2, granularity="per_group", group_size=128),
}
BASE = "ONNX Runtime, float"

OUT = flags.DEFINE_string("out", None, "JSON file for the figures.")
CASES = flags.DEFINE_multi_enum("models", [*MODELS, "matrix"], [*MODELS, "matrix"], "Which.")
BITS = flags.DEFINE_list("bits", ["W8A8", "W4A8", "W2A8"], "Widths of weights and activations.")
BATCHES = flags.DEFINE_list("batches", ["1", "64"], "Batch sizes.")
THREADS = flags.DEFINE_integer("threads", None, "Of each runtime but JAX; one a core if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 30, "Rounds that count.")

Call = Callable[[np.ndarray], Any]


def _onnx(integer: deploy.IntegerModel, images: np.ndarray, threads: int, exact: bool) -> Call:
    proto = deploy.to_onnx(integer, images[:1]).SerializeToString()
    session = deploy.onnx_session(proto, threads=threads, exact=exact)
    return lambda batch: session.run(None, {"input": batch})


def _openvino(integer: deploy.IntegerModel, images: np.ndarray, threads: int) -> Call:
    (openvino,) = extras.load("bench", "openvino")
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    proto = deploy.to_onnx(integer, images[:1]).SerializeToString()
    request = core.compile_model(core.read_model(proto), "CPU").create_infer_request()
    return lambda batch: request.infer({0: batch})


def _litert(integer: deploy.IntegerModel, images: np.ndarray, threads: int) -> Call:
    return litert.load_litert(litert.to_litert(integer, images[:1]), threads=threads)


def _jax(integer: deploy.IntegerModel) -> Call:
    return lambda batch: jax.block_until_ready(integer(batch))


def _runtimes(
    name: str, integer: deploy.IntegerModel, images: np.ndarray, threads: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """The runtimes that take a model, and what the others say."""
    makers = {
        "ONNX Runtime": lambda: _onnx(integer, images, threads, True),
        "JAX": lambda: _jax(integer),
        "LiteRT": lambda: _litert(integer, images, threads),
        "OpenVINO": lambda: _openvino(integer, images, threads),
    }
    if name != "float":
        makers["ONNX Runtime, inexact"] = lambda: _onnx(integer, images, threads, False)
    calls, failed = {}, {}
    for runtime, make in makers.items():
        key = f"{runtime}, {name}"
        try:
            call = make()
            call(images[:1])
            calls[key] = call
        except Exception as error:  # of any library: it is in the figures
            failed[key] = f"fails: {str(error).strip().splitlines()[0][:150]}"
    return calls, failed


def _measure(
    forms: Mapping[str, deploy.IntegerModel], images: np.ndarray, batches: list[int]
) -> dict[str, Any]:
    """Every form of a model in every runtime."""
    cores = latency.cores(THREADS.value)
    with latency.pinned(cores):
        calls, failed = {}, {}
        for name, integer in forms.items():
            running, without = _runtimes(name, integer, images, len(cores))
            calls |= running
            failed |= without
        timed = latency.measure(calls, images, base=BASE, batches=batches, rounds=ROUNDS.value)
        timings = {
            name: {str(size): dataclasses.asdict(t) for size, t in sizes.items()}
            for name, sizes in timed.items()
        }
    return {"conditions": latency.conditions(cores), "runtimes": {**timings, **failed}}


def _network(name: str) -> tuple[nn.Module, Any, np.ndarray]:
    model = models.build(**MODELS[name], num_classes=10)
    images = np.random.default_rng(0).normal(size=(64, 28, 28, 1)).astype(np.float32)
    return model, jax.jit(model.init)(jax.random.key(0), images[:1]), images


def _forms(name: str, bits: list[str]) -> tuple[dict[str, deploy.IntegerModel], np.ndarray]:
    """A network in float and at each width."""
    model, variables, images = _network(name)
    forms = {"float": deploy.lower(model, Weights(variables=variables, qparams={}), images[:1])}
    for width in bits:
        weights, activations = (int(n) for n in width.removeprefix("W").split("A"))
        rules = quantize.uniform_rules(weights, activations)
        qparams = quantize.calibrate(model, variables, rules, [images])
        forms[width] = deploy.lower(
            model, Weights(variables=variables, qparams=qparams), images[:1]
        )
    return forms, images


def _matrix_forms() -> tuple[dict[str, deploy.IntegerModel], np.ndarray]:
    model = nn.Dense(WIDTH)
    images = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    forms = {"float": deploy.lower(model, Weights(variables=variables, qparams={}), images[:1])}
    for name, spec in MATRIX.items():
        rules = (quantize.QuantizationRule(path=".*", weights=spec),)
        qparams = quantize.calibrate(model, variables, rules, [images])
        forms[name] = deploy.lower(model, Weights(variables=variables, qparams=qparams), images[:1])
    return forms, images


def main(_: list[str]) -> None:
    figures = {}
    for name in dict.fromkeys(CASES.value):
        forms, images = _matrix_forms() if name == "matrix" else _forms(name, BITS.value)
        batches = [1] if name == "matrix" else [int(size) for size in BATCHES.value]
        figures[name] = _measure(forms, images, batches)
        show(name, {k: _line(v) for k, v in figures[name]["runtimes"].items()})
    publish(figures, OUT.value, rounds=ROUNDS.value)


def _line(row: Any) -> str:
    if isinstance(row, str):
        return row
    return "; ".join(
        f"batch {size}: {t['milliseconds']:.3f} ms, {t['ratio']:.2f}x" for size, t in row.items()
    )


if __name__ == "__main__":
    run(main)
