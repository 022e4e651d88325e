"""What quantization does to each layer's output and to the model's: a report, before and after."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize.inputs import Batch, unboxed
from kdq.quantize.layers import list_layers
from kdq.quantize.ptq.divergence import kl
from kdq.quantize.ptq.options import Progress, as_list, quiet
from kdq.quantize.ptq.watch import outputs_of
from kdq.types import Array, QParams, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Errors against the float model, of two quantized models; `str` is a table."""

    # {layer: (before, after)}, dB; inf where there is no error, nan where the float output is 0.
    # A layer of a stack is "PATH[index]".
    sqnr: Mapping[str, tuple[float, float]]
    kl: tuple[float, float] | None  # nats, mean of the examples; None if the output is no logits
    reason: str = ""  # why there is no KL

    def to_json(self) -> dict[str, Any]:
        """{"layers": {path: [before, after]}, "kl": the same or None}; None where no number is."""
        finite = lambda pair: [float(v) if np.isfinite(v) else None for v in pair]
        return {
            "layers": {path: finite(pair) for path, pair in self.sqnr.items()},
            "kl": None if self.kl is None else finite(self.kl),
        }

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
    batches: Iterable[Batch],
    *,
    target: Variables | None = None,
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
      target: the float model's that `after` is compared with, where methods changed its layers but
        not its function (folding, rescaling); None: `variables`.
      apply_kwargs: passed to the model; in evaluation mode.
      progress: see `options`.

    Raises:
      ValueError: no batches, or a float output that is not finite; names the layer.
    """
    batches = as_list(batches, "layer_errors", apply_kwargs)
    plain = unboxed(variables)
    layers = list_layers(model, plain, batches[0])
    depths = tuple((path, len(layer.stack)) for path, layer in layers.items())
    options = {"model": model, "depths": depths}
    pairs = ((plain, before), (plain if target is None else unboxed(target), after))
    pairs = tuple((clean, (unboxed(noisy), qparams)) for clean, (noisy, qparams) in pairs)
    total = None
    for inputs in progress(batches, "measuring errors"):
        found = _energies(pairs, inputs, **options)
        found = jax.tree.map(lambda v: np.asarray(v, np.float64), found)
        total = found if total is None else jax.tree.map(np.add, total, found)
    energies, divergence = total
    sqnr = {}
    for path in layers:  # a `jit` sorts its dicts
        ratios = energies[path]
        if not all(np.isfinite(signal).all() for signal, _ in ratios):
            raise ValueError(f"layer_errors met NaN or infinity in the output of layer {path!r}")
        for index in np.ndindex(ratios[0][0].shape):
            name = path + "".join(f"[{i}]" for i in index)
            sqnr[name] = tuple(_decibel(signal[index], noise[index]) for signal, noise in ratios)
    if divergence is None:
        reason = "the model's output is not one array of logits"
        return LayerErrors(sqnr=sqnr, kl=None, reason=reason)
    *sums, examples = divergence
    return LayerErrors(sqnr=sqnr, kl=tuple(float(v / examples) for v in sums))


def _decibel(signal: float, noise: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.float64(signal) / np.float64(noise)))


@partial(jax.jit, static_argnames=("model", "depths"))
def _energies(pairs, inputs, *, model, depths):
    """{path: ((signal, noise) of each pair)}, each [*stack]; sums of KL, and their count."""
    takes = {path: lambda output: output.astype(jnp.float32) for path, _ in depths}
    run = lambda variables, qparams: outputs_of(model, variables, qparams, inputs, takes)
    runs = [(run(target, {}), run(*quantized)) for target, quantized in pairs]
    energies = {}
    for path, depth in depths:
        energy = lambda x, depth=depth: jnp.square(x).sum(tuple(range(depth, x.ndim)))
        energies[path] = tuple(
            (
                sum(map(energy, clean[path])),
                sum(energy(a - b) for a, b in zip(clean[path], noisy[path], strict=True)),
            )
            for (_, clean), (_, noisy) in runs
        )
    return energies, _divergences([(clean, noisy) for (clean, _), (noisy, _) in runs])


def _divergences(pairs: Sequence[tuple[Any, Any]]) -> tuple[Array, ...] | None:
    logits = pairs[0][0]
    if not isinstance(logits, jax.Array) or not logits.ndim:
        return None
    examples = jnp.float32(logits.size // logits.shape[-1])
    return (*(kl(clean, noisy).sum() for clean, noisy in pairs), examples)
