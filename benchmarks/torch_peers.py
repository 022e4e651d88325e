"""Time of a quantization-aware training step of torchao and Brevitas over PyTorch's float step.

    pip install torch torchao brevitas
    python benchmarks/torch_peers.py --out=benchmarks/results/torch_peers.json
    python benchmarks/torch_peers.py --compile --out=benchmarks/results/torch_peers_compile.json

The models, batches and rules of optimizers are those of qat_step.py, and so is what a ratio means;
its base is PyTorch's own float step, compiled too with --compile. A peer that is not installed or
that raises is a line of the results.

torchao: its export flow (PT2E), static W8A8, weights per channel, ranges by a moving average; its
flow for linear layers, W4A8 in groups of 32 with a scale for each token. Brevitas: its default
quantizers, weights by their absolute maximum, activations with a learned scale, after the steps in
which it gathers statistics.
"""

import functools
import warnings
from collections.abc import Callable
from importlib import metadata

import numpy as np
import torch
from absl import flags
from interleaved import Step, publish, run, show, take_turns
from torch import nn
from torch_models import MODELS, Layers

OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 60, "Timed rounds of each model.")
OPTIMIZER = flags.DEFINE_enum(
    "optimizer", "sgd", ("sgd", "adam"), "sgd with Nesterov momentum, or adam."
)
COMPILE = flags.DEFINE_bool("compile", False, "torch.compile every model, the float one too.")
CHOSEN_MODELS = flags.DEFINE_multi_enum("models", list(MODELS), list(MODELS), "Models to measure.")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
}
Build = Callable[[Layers], nn.Module]


def brevitas_layers(bits: int) -> Layers:
    """Layers of Brevitas whose weights and inputs have so many bits."""
    import brevitas.nn as qnn  # noqa: PLC0415 - an extra
    from brevitas.quant import Int8ActPerTensorFloat  # noqa: PLC0415

    # One step in place of 300, in which it sorts every activation: what is timed comes after them.
    inputs = {"bit_width": bits, "collect_stats_steps": 1}
    quantized = {
        "weight_bit_width": bits,
        "input_quant": Int8ActPerTensorFloat,
        **{f"input_{key}": value for key, value in inputs.items()},
    }
    return Layers(
        linear=functools.partial(qnn.QuantLinear, **quantized),
        conv=functools.partial(qnn.QuantConv2d, **quantized),
        operand=functools.partial(
            qnn.QuantIdentity, act_quant=Int8ActPerTensorFloat, return_quant_tensor=False, **inputs
        ),
    )


def torchao_exported(build: Build, images: torch.Tensor) -> nn.Module:
    """Static W8A8 of every layer that torchao's quantizer for CPUs knows."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e  # noqa: PLC0415 - an extra
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: PLC0415

    quantizer = x86.X86InductorQuantizer()
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    quantizer.set_global(config).set_function_type_qconfig(torch.matmul, config)
    exported = torch.export.export(build(Layers()).train(), (images,)).module()
    return prepare_qat_pt2e(exported, quantizer)


def torchao_linear(build: Build, images: torch.Tensor) -> nn.Module:
    """W4A8 of the linear layers: torchao's own pair of quantizers for training."""
    from torchao.quantization import quantize_  # noqa: PLC0415 - an extra
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig  # noqa: PLC0415

    model = build(Layers()).train()
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32),
        step="prepare",
    )
    divides = lambda module, path: isinstance(module, nn.Linear) and module.in_features % 32 == 0
    quantize_(model, config, filter_fn=divides)
    return model


VARIANTS: dict[str, Callable[[Build, torch.Tensor], nn.Module]] = {
    "fp32": lambda build, images: build(Layers()),
    "torchao W8A8, exported": torchao_exported,
    "torchao W4A8, linear layers": torchao_linear,
    "Brevitas W8A8": lambda build, images: build(brevitas_layers(8)),
    "Brevitas W4A4": lambda build, images: build(brevitas_layers(4)),
}
LEFT_OUT = {("resnet", "torchao W4A8, linear layers"): "not measured: only its head is linear"}


def make_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Step:
    """One step of training; returns the loss as a number, so that nothing is left to wait for."""
    optimizer = OPTIMIZERS[OPTIMIZER.value](model.parameters())
    run = torch.compile(model) if COMPILE.value else model

    def take() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return take


def variants(name: str) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of a model that run, by name, and why the others do not."""
    _, build, shape = MODELS[name]
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.standard_normal(shape, np.float32))
    labels = torch.tensor(rng.integers(0, 10, shape[0]))
    steps: dict[str, Step] = {}
    failures: dict[str, str] = {}
    for variant, make in VARIANTS.items():
        if (name, variant) in LEFT_OUT:
            failures[variant] = LEFT_OUT[name, variant]
            continue
        try:
            torch.manual_seed(0)
            step = make_step(make(build, images), images, labels)
            for _ in range(3):  # what is initialized from the first batches, and compiled
                step()
            steps[variant] = step
        except ModuleNotFoundError as error:
            failures[variant] = f"not measured: {error.name} is not installed"
        except Exception as error:  # what a peer raises is a result
            if variant == "fp32":
                raise
            first = (str(error).splitlines() or [""])[0]
            failures[variant] = f"fails: {type(error).__name__}: {first[:120]}"
    return steps, failures


def peer_versions() -> dict[str, str]:
    """Versions of what is measured here."""
    versions = {}
    for package in ("torch", "torchao", "brevitas"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def main(_: list[str]) -> None:
    warnings.simplefilter("ignore")  # peers' own deprecations
    figures = {}
    for name in CHOSEN_MODELS.value:
        title = MODELS[name][0]
        steps, failures = variants(name)
        rows = take_turns(steps, "fp32", rounds=ROUNDS.value)
        figures[title] = {v: rows.get(v, {"error": failures.get(v)}) for v in VARIANTS}
        show(title, figures[title])
    publish(
        figures,
        OUT.value,
        optimizer=OPTIMIZER.value,
        rounds=ROUNDS.value,
        compiled=COMPILE.value,
        threads=torch.get_num_threads(),
        peers=peer_versions(),
    )


if __name__ == "__main__":
    run(main)
