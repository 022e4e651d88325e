"""Time of a quantization-aware training step over the float step of the same model.

    python benchmarks/qat_step.py --optimizer=sgd --out=benchmarks/results/qat_step_sgd.json

All variants of a model take turns, step by step, in one process; a ratio is the median over rounds
of the variant's time over the float step's time in the same round. Qwix joins in if it is installed
(pip install 'kdq[bench]'); benchmarks/torch_peers.py has the peers that run on PyTorch.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import flags
from interleaved import Step, publish, run, show, take_turns

from kdq import config, models, quantize
from kdq.distill.capture import Outputs
from kdq.quantize.network import Weights
from kdq.quantize.qat import METHODS
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import train_step
from kdq.train.training import Training, create_state

OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 60, "Timed rounds of each model.")
OPTIMIZER = flags.DEFINE_enum(
    "optimizer", "sgd", ("sgd", "adam"), "sgd with Nesterov momentum, or adam."
)


class Setting(NamedTuple):
    """A model and its batch."""

    title: str
    fields: dict[str, Any]
    shape: tuple[int, ...]  # of the images


MODELS = {
    "mlp": Setting(
        "MLP 784-1024-1024-10, batch 256",
        {"name": "mlp", "num_classes": 10, "widths": (1024, 1024)},
        (256, 28, 28, 1),
    ),
    "resnet": Setting(
        "ResNet-8 16/32/64, 32x32x3, batch 64",
        {"name": "resnet", "num_classes": 10, "depth": 8},
        (64, 32, 32, 3),
    ),
    "vit": Setting(
        "ViT 4 blocks of 128, 4 heads, patch 4, 32x32x3, batch 64",
        {"name": "vit", "num_classes": 10, "patch": 4, "width": 128, "depth": 4, "heads": 4},
        (64, 32, 32, 3),
    ),
}
BITS = ("W8A8", "W4A4")
# Bits change nothing of what is computed; two methods show that they do not.
BITS_OF = dict.fromkeys(METHODS, ("W4A4",)) | {"ste": BITS, "lsq": BITS}

CHOSEN_MODELS = flags.DEFINE_multi_enum("models", list(MODELS), list(MODELS), "Models to measure.")
CHOSEN_METHODS = flags.DEFINE_multi_enum(
    "methods", list(METHODS), list(METHODS), "Methods of kdq to measure; peers are not of them."
)


def kdq_step(
    model: nn.Module,
    variables,
    batch,
    method: str = "",
    bits: str = "",
    fixed_scales: Sequence[str] = (),
) -> Step:
    """A step of kdq's own trainer: float (no method), or quantized by a method."""
    optimizer = config.Optimizer(name=OPTIMIZER.value)
    qparams = {}
    if method:
        rules = quantize.uniform_rules(*config.parse_bits(bits))
        qparams = quantize.calibrate(model, variables, rules, [batch["image"]])
        variables, qparams = quantize.prepare(variables, qparams, method)
    state = create_state(
        Weights(variables=variables, qparams=qparams),
        optimizer,
        seed=0,
        steps=10_000,
        learning_rate=1e-3,
        fixed_scales=fixed_scales,
    )
    training = Training(network=model, optimizer=make_optimizer(optimizer), objective=Objective())

    def take():
        nonlocal state
        state, metrics = train_step(training, state, batch)
        return state, metrics

    return take


def qwix_step(model: nn.Module, variables, batch, bits: str) -> Step:
    """The same step with Qwix's quantization-aware model and the same optimizer rule."""
    import qwix  # noqa: PLC0415 - an extra

    weights, activations = config.parse_bits(bits)
    rule = qwix.QtRule(
        module_path=".*", weight_qtype=f"int{weights}", act_qtype=f"int{activations}"
    )
    quantized = qwix.quantize_model(model, qwix.QtProvider([rule]))
    rules = {"sgd": lambda: optax.sgd(1e-3, 0.9, nesterov=True), "adam": lambda: optax.adam(1e-3)}
    optimizer = rules[OPTIMIZER.value]()
    others = {k: v for k, v in variables.items() if k != "params"}

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, others, opt_state, batch):
        def loss_fn(params):
            logits, updated = quantized.apply(
                {"params": params, **others}, batch["image"], train=True, mutable=list(others)
            )
            loss, *_ = Objective()(Outputs(logits=logits), None, batch)
            return loss, updated

        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), updated, opt_state, loss

    copy = functools.partial(jax.tree.map, jax.numpy.array)
    carry = (copy(variables["params"]), copy(others), optimizer.init(variables["params"]))

    def take():
        nonlocal carry
        *carry, loss = step(*carry, batch)
        return carry, loss

    return take


def variants(model: nn.Module, variables, batch) -> dict[str, Step | str]:
    """Named steps; a string in place of a step says why it can't run."""
    layers = quantize.list_layers(model, variables, batch["image"])
    # As is advised (`quantize.scales`): pixels do not move, so their scale stays as calibrated.
    of_pixels = (f"{next(iter(layers))}/activations",)
    ours = functools.partial(kdq_step, model, variables, batch)
    makers = {"fp32": ours}
    for method in CHOSEN_METHODS.value:
        for bits in BITS_OF[method]:
            makers[f"kdq {bits} {method}"] = functools.partial(ours, method, bits, of_pixels)
    if "lsq" in CHOSEN_METHODS.value:
        makers["kdq W4A4 lsq, of the pixels too"] = functools.partial(ours, "lsq", "W4A4")
    for bits in BITS:
        makers[f"Qwix {bits}"] = functools.partial(qwix_step, model, variables, batch, bits)
    made: dict[str, Step | str] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
            jax.block_until_ready(made[name]())
        except ModuleNotFoundError as error:
            made[name] = f"not measured: {error.name} is not installed"
        except Exception as error:  # what a peer raises is a result
            if not name.startswith("Qwix"):
                raise
            made[name] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return made


def measure(steps: dict[str, Step | str], rounds: int) -> dict[str, Any]:
    """The figures of the steps that run, and why the others do not."""
    running = {name: step for name, step in steps.items() if callable(step)}
    rows = take_turns(running, "fp32", rounds=rounds)
    return {name: rows.get(name, {"error": step}) for name, step in steps.items()}


def main(_: list[str]) -> None:
    figures = {}
    for title, fields, shape in map(MODELS.get, CHOSEN_MODELS.value):
        model = models.build(**fields)
        rng = np.random.default_rng(0)
        batch = {
            "image": jax.device_put(rng.standard_normal(shape, np.float32)),
            "label": jax.device_put(rng.integers(0, 10, shape[0]).astype(np.int32)),
        }
        variables = quantize.as_network(model).init(jax.random.key(0), batch["image"])
        figures[title] = measure(variants(model, variables, batch), ROUNDS.value)
        show(title, figures[title])
    publish(figures, OUT.value, optimizer=OPTIMIZER.value, rounds=ROUNDS.value)


if __name__ == "__main__":
    run(main)
