"""Errors of quantization in each layer's output and in the model's: before and after."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq.entropy import kl
from kdq.quantize.inputs import Batch, Inputs, as_batches, unboxed
from kdq.quantize.layers import LayerInfo, list_layers
from kdq.quantize.masks import counted
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.ptq.options import Progress, quiet
from kdq.quantize.ptq.watch import outputs_of
from kdq.quantize.table import aligned
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
        lines = aligned(rows, numbers=3)
        if self.kl is None:
            lines.append(f"KL(float || quantized): {self.reason}")
        else:
            before, after = self.kl
            lines.append(f"KL(float || quantized): {before:.3e} before, {after:.3e} after")
        return "\n".join(lines)


def layer_errors(
    network: Network | nn.Module,
    variables: Variables,
    before: tuple[Variables, QParams],
    after: tuple[Variables, QParams],
    batches: Iterable[Batch],
    *,
    target: Variables | None = None,
    progress: Progress = quiet,
) -> LayerErrors:
    """Compares two quantized models with the float one, layer by layer and at the output.

    SQNR = 10 log10(Σ y² / Σ (y - ŷ)²) over all batches: y is the output of a layer in the float
    model, ŷ in the quantized one, where the layers before it are quantized too. The KL divergence
    is Σ p log(p / p̂) of the softmax over the last axis of the model's output, the mean of all else.

    Args:
      network: any Linen module, or a `Network`.
      variables: the float model's.
      before: `(variables, qparams)` of a quantized model.
      after: of another; of one that fits as well, e.g. after a method.
      batches: inputs of the model, all of one shape.
      target: the float model's that `after` is compared with, where methods changed its layers but
        not its function (folding, rescaling); None: `variables`.
      progress: see `options`.

    Raises:
      ValueError: no batches, or a float output that is not finite; names the layer.
    """
    batches = list(as_batches(batches, "layer_errors"))
    plain = unboxed(variables)
    pairs = ((plain, before), (plain if target is None else unboxed(target), after))
    network = as_network(network)
    layers, total = measure_energies(network, pairs, progress(batches, "measuring errors"))
    energies, _, divergence = total
    for path in layers:
        if not all(np.isfinite(signal).all() for signal, _ in energies[path]):
            raise ValueError(f"layer_errors met NaN or infinity in the output of layer {path!r}")
    sqnr = {
        name: tuple(decibel(signal[index], noise[index]) for signal, noise in energies[path])
        for name, path, index in list_places(layers)
    }
    if divergence is None:
        reason = "the model's output is not one array of logits"
        return LayerErrors(sqnr=sqnr, kl=None, reason=reason)
    *sums, examples = divergence
    return LayerErrors(sqnr=sqnr, kl=tuple(float(v / examples) for v in sums))


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, nan without either."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.float64(signal) / np.float64(noise)))


def list_places(layers: Mapping[str, LayerInfo]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """`(name, path, index)` of each layer of each stack, in the order in which they run."""
    for path, layer in layers.items():  # a `jit` sorts its dicts
        for index in np.ndindex(layer.stack):
            yield path + "".join(f"[{i}]" for i in index), path, index


Pair = tuple[Variables, tuple[Variables, QParams]]  # float, and a quantized model


def measure_energies(
    network: Network, pairs: Sequence[Pair], batches: Iterable[Inputs]
) -> tuple[Mapping[str, LayerInfo], tuple[Any, Any, Any]]:
    """Sums over all batches of squared outputs, and of squared errors.

    `pairs` are each quantized model with the float one that it is compared with. Returns the
    layers, and `(energies, outputs, divergence)`: {path: ((signal, noise) of each pair)}, [*stack]
    each; the same of the model's own outputs; Σ KL of each pair and the number of examples, None
    where the outputs have no prediction.
    """
    pairs = [(unboxed(clean), (unboxed(noisy), qparams)) for clean, (noisy, qparams) in pairs]
    layers, total = {}, None
    for inputs in batches:
        layers = list_layers(network, pairs[0][0], inputs)  # traced once for a shape
        depths = tuple((path, len(layer.stack)) for path, layer in layers.items())
        sums = _energies(pairs, inputs, network=network, depths=depths)
        sums = jax.tree.map(lambda v: np.asarray(v, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return layers, total


@partial(jax.jit, static_argnames=("network", "depths"))
def _energies(pairs, inputs, *, network, depths):
    """See `measure_energies`; of one batch."""
    takes = dict.fromkeys((path for path, _ in depths), _counting)

    def run(variables, qparams):
        return outputs_of(network, Weights(variables=variables, qparams=qparams), inputs, takes)

    runs = [(run(target, {}), run(*quantized)) for target, quantized in pairs]
    energies = {}
    for path, depth in depths:
        energies[path] = tuple(
            _signal_and_noise(clean[path], noisy[path], depth) for (_, clean), (_, noisy) in runs
        )
    whole = [(clean, noisy) for (clean, _), (noisy, _) in runs]
    floats = partial(_floats, mask=inputs.mask)
    outputs = tuple(_signal_and_noise(*map(floats, pair), 0) for pair in whole)
    return energies, outputs, _divergences(network, whole, inputs.mask)


def _counting(output: Array, counts: Array | None) -> Array:
    """An output in float32, 0 where it is padding."""
    output = output.astype(jnp.float32)
    return output if counts is None else jnp.where(counts, output, 0)


def _signal_and_noise(
    clean: Sequence[Array], noisy: Sequence[Array], depth: int
) -> tuple[Array, Array]:
    """Sums of squares of arrays and of what they are apart, without the first `depth` axes."""
    energy = lambda x: jnp.square(x).sum(tuple(range(depth, x.ndim)))
    return (
        sum(map(energy, clean), jnp.zeros(())),
        sum((energy(a - b) for a, b in zip(clean, noisy, strict=True)), jnp.zeros(())),
    )


def _floats(outputs: Any, mask: Array | None) -> list[Array]:
    """The float arrays of a model's outputs, 0 where they are padding."""
    is_float = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.floating)
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if is_float(leaf)]
    return [_counting(leaf, counted(mask, jnp.asarray(leaf))) for leaf in leaves]


def _divergences(
    network: Network, pairs: Sequence[tuple[Any, Any]], mask: Array | None
) -> tuple[Array, ...] | None:
    try:
        pairs = [tuple(map(network.select_prediction, pair)) for pair in pairs]
    except ValueError:
        return None
    logits = pairs[0][0]
    if not isinstance(logits, jax.Array) or not logits.ndim:
        return None
    counts = counted(mask, logits)
    where = None if counts is None else jnp.broadcast_to(counts[..., 0], logits.shape[:-1])
    examples = logits.size // logits.shape[-1] if where is None else where.sum()
    return (*(kl(clean, noisy).sum(where=where) for clean, noisy in pairs), jnp.float32(examples))
