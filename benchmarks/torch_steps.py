"""The training steps of kdq's arms in plain PyTorch, for throughput.py."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch_models
from torch import Tensor, nn
from torch.nn import functional
from torch_models import LSQ, Layers

from kdq import config
from kdq.config import Experiment

# Each recipe compiles the same function anew; past eight PyTorch would run the rest uncompiled.
torch._dynamo.config.recompile_limit = 64


def torch_take(
    experiment: Experiment, name: str, cached: bool, batch: Mapping[str, Any], *, compiled: bool
) -> Callable[[int], None]:
    """Returns a function that takes so many steps of an arm.

    Args:
      experiment: has the arm, its models and its loss.
      name: of the arm.
      cached: whether the teacher's logits are in the batch; else the teacher runs.
      batch: as kdq's step has it.
      compiled: by torch.compile, the optimizer apart, which is one fused kernel already.
    """
    torch.manual_seed(0)
    arm, channels = experiment.arms[name], batch["image"].shape[-1]
    student = _build(experiment.models[arm.model], LSQ if arm.bits else Layers(), channels).train()
    if arm.bits:
        bits, _ = config.parse_bits(arm.bits)
        torch_models.set_bits(student, bits, experiment.quantize.keep_bits)
    images = torch.tensor(np.moveaxis(np.asarray(batch["image"]), -1, 1).copy())
    labels = torch.tensor(np.asarray(batch["label"])).long()
    stored = torch.tensor(np.asarray(batch["teacher_logits"])) if cached else None
    teacher = None
    if arm.teacher and not cached:
        fields = experiment.models[experiment.arms[arm.teacher].model]
        teacher = _build(fields, Layers(), channels).eval().requires_grad_(False)
    recipe = experiment.distill[arm.distill] if arm.teacher else None

    def loss_of(images: Tensor, labels: Tensor, stored: Tensor | None) -> Tensor:
        logits = student(images)
        task = functional.cross_entropy(logits, labels)
        if not recipe:
            return task
        term, taught = recipe.terms["kl"], teacher(images) if teacher else stored
        t = term["temperature"]
        ours, theirs = (functional.log_softmax(x / t, -1) for x in (logits, taught))
        kl = functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        return recipe.task * task + term["weight"] * t**2 * kl

    optimizer = _adam(student, arm.learning_rate, experiment.optimizer.scale_rate)
    compute = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def take(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            compute(images, labels, stored).backward()
            optimizer.step()

    return take


def _build(fields: Mapping[str, Any], layers: Layers, channels: int) -> nn.Module:
    """The model that a config names, if `torch_models` has it."""
    make = getattr(torch_models, fields["name"])
    return make(layers, inputs=channels, **{k: v for k, v in fields.items() if k != "name"})


def _adam(student: nn.Module, rate: float, scale_rate: float) -> torch.optim.Optimizer:
    """With a rate of their own for the scales of quantizers."""
    is_scale = lambda name: name.endswith("_scale")
    named = list(student.named_parameters())
    groups = [{"params": [p for name, p in named if not is_scale(name)]}]
    if scales := [p for name, p in named if is_scale(name)]:
        groups.append({"params": scales, "lr": rate * scale_rate})
    return torch.optim.Adam(groups, rate, fused=True)
