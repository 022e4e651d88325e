"""What quantization does to each layer's output and to the model's: a report, before and after."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize.layers import list_layers
from kdq.quantize.ptq.watch import Progress, first_of, outputs_of, quiet, static
from kdq.types import Array, QParams, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Errors against the float model, of two quantized models; `str` is a table."""

    # {layer: (before, after)}, dB; inf where there is no error, nan where the float output is 0.
    # A layer of a stack is "PATH[index]".
    sqnr: Mapping[str, tuple[float, float]]
    kl: tuple[float, float] | None  # nats, mean of the examples; None if the output is no logits
    reason: str = ""  # why there is no KL

    def __str__(self) -> str:
        rows = [("layer", "SQNR before", "after", "gain [dB]")]
        for path, (before, after) in self.sqnr.items():
            gain = "" if before == after else f"{after - before:+.2f}"
            rows.append((path or '""', f"{before:.2f}", f"{after:.2f}", gain))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *numbers in rows:
            cells = [first.ljust(widths[0])]
            cells += [n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        if self.kl is None:
            lines.append(f"KL(float || quantized): {self.reason}")
        else:
            before, after = self.kl
            lines.append(f"KL(float || quantized): {before:.3e} before, {after:.3e} after")
        return "\n".join(lines)


def layer_errors(
    model: nn.Module,
    variables: Variables,
    before: tuple[Variables, QParams],
    after: tuple[Variables, QParams],
    batches: Sequence[Array | tuple],
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> LayerErrors:
    """Compares two quantized models with the float one, layer by layer and at the output.

    SQNR = 10 log10(Σ y² / Σ (y - ŷ)²) over all batches: y is the output of a layer in the float
    model, ŷ in the quantized one, where the layers before it are quantized too. The KL divergence
    is Σ p log(p / p̂) of the softmax over the last axis of the model's output, the mean of all else.

    Args:
      model: any Linen module.
      variables: the float model's.
      before: `(variables, qparams)` of a quantized model.
      after: of another; of one that fits as well, e.g. after a method.
      batches: inputs of the model, all of one shape.
      apply_kwargs: passed to the model; in evaluation mode.
      progress: see `watch`.

    Raises:
      ValueError: no batches, or a float output that is not finite; names the layer.
    """
    inputs = first_of(batches, "layer_errors")
    layers = list_layers(model, variables, inputs, **(apply_kwargs or {}))
    depths = tuple((path, len(layer.stack)) for path, layer in layers.items())
    options = {"model": model, "depths": depths, "kwargs": static(apply_kwargs)}
    total = None
    for inputs in progress(batches, "measuring errors"):
        found = _energies(variables, before, after, inputs, **options)
        found = jax.tree.map(lambda v: np.asarray(v, np.float64), found)
        total = found if total is None else jax.tree.map(np.add, total, found)
    energies, divergence = total
    sqnr = {}
    for path in layers:  # a `jit` sorts its dicts
        signal, *noises = energies[path]
        if not np.isfinite(signal).all():
            raise ValueError(f"layer_errors met NaN or infinity in the output of layer {path!r}")
        for index in np.ndindex(signal.shape):
            name = path + "".join(f"[{i}]" for i in index)
            sqnr[name] = tuple(_decibel(signal[index], noise[index]) for noise in noises)
    if divergence is None:
        reason = "the model's output is not one array of logits"
        return LayerErrors(sqnr=sqnr, kl=None, reason=reason)
    *sums, examples = divergence
    return LayerErrors(sqnr=sqnr, kl=tuple(float(v / examples) for v in sums))


def _decibel(signal: float, noise: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.float64(signal) / np.float64(noise)))


@partial(jax.jit, static_argnames=("model", "depths", "kwargs"))
def _energies(variables, before, after, inputs, *, model, depths, kwargs):
    """{path: (signal, noise before, noise after)}, each [*stack]; sums of KL and their count."""
    takes = {path: lambda output: output.astype(jnp.float32) for path, _ in depths}
    models = [(variables, {}), before, after]
    outputs, seen = zip(
        *(outputs_of(model, v, q, inputs, takes, dict(kwargs)) for v, q in models), strict=True
    )
    energies = {}
    for path, depth in depths:
        energy = lambda x, depth=depth: jnp.square(x).sum(tuple(range(depth, x.ndim)))
        clean, *others = (calls[path] for calls in seen)
        noises = [sum(energy(a - b) for a, b in zip(clean, other, strict=True)) for other in others]
        energies[path] = (sum(map(energy, clean)), *noises)
    return energies, _divergences(*outputs)


def _divergences(outputs: Any, *others: Any) -> tuple[Array, ...] | None:
    if not isinstance(outputs, jax.Array) or not outputs.ndim:
        return None
    clean, *others = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (outputs, *others))
    sums = [(jnp.exp(clean) * (clean - other)).sum() for other in others]
    return (*sums, jnp.float32(clean.size // clean.shape[-1]))
