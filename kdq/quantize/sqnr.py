"""Signal to quantization noise, layer by layer: where a quantized model loses what it computes."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.quantize.inputs import Batch, Inputs, as_batches, unboxed
from kdq.quantize.layers import LayerInfo, layer_bits
from kdq.quantize.network import Network, as_network
from kdq.quantize.observe import Key, observe
from kdq.quantize.paths import at_path
from kdq.quantize.ptq.errors import decibel, list_places, measure_energies
from kdq.quantize.ste import fake_quantize
from kdq.quantize.table import aligned
from kdq.types import Array, QParams, Variables

LOW = 10.0  # dB, under which `warn_of_noise` warns: a third of the amplitude is noise
SHOWN = 5  # layers that it names
REMEDIES = (
    "more bits, weights per_channel, an observer that clips (MSE, Percentile), of kdq.quantize.ptq "
    "fold_batch_norm and equalize before calibration and gptq or adaround after it, "
    "training through the quantizers (QAT), or leaving the layer in float"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSqnr:
    """One layer; ratios in dB: inf without noise, nan without signal."""

    bits: str  # "W4A8", "" if it is in float
    weights: float | None  # of its weight alone; None if that is not quantized
    inputs: Mapping[str, float]  # by operand: of the float model's inputs, rounded
    output: float  # of its output, all layers before it quantized too
    signal: float  # sum of the squares of its float output, over all batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sqnr:
    """Signal to quantization noise ratios, against the float model; `str` is a table."""

    layers: Mapping[str, LayerSqnr]  # in the order in which they run; of a stack "PATH[index]"
    output: float  # dB, of the model's outputs
    signal: float  # sum of the squares of the float model's outputs

    def __str__(self) -> str:
        rows = [("layer", "bits", "weights", "inputs", "output [dB]", "float energy")]
        for path, layer in self.layers.items():
            inputs = " × ".join(f"{ratio:.1f}" for ratio in layer.inputs.values())
            weights = "" if layer.weights is None else f"{layer.weights:.1f}"
            numbers = (weights, inputs, f"{layer.output:.1f}", f"{layer.signal:.4g}")
            rows.append((path or '""', layer.bits or "float", *numbers))
        rows.append(("the model's outputs", "", "", "", f"{self.output:.1f}", f"{self.signal:.4g}"))
        return "\n".join(aligned(rows, numbers=4))

    def low(self, limit: float = LOW) -> dict[str, float]:
        """The layers whose output is under `limit` dB, the worst first."""
        under = {p: layer.output for p, layer in self.layers.items() if layer.output < limit}
        return dict(sorted(under.items(), key=lambda item: item[1]))


def sqnr(
    network: Network | nn.Module,
    variables: Variables,
    qparams: QParams,
    batches: Iterable[Batch],
    *,
    target: Variables | None = None,
) -> Sqnr:
    """The ratios 10 log10(Σ y² / Σ (y - ŷ)²), over all batches, of a quantized model.

    Of a weight and of an input, y is the float tensor and ŷ that tensor rounded. Of an output, ŷ is
    what the quantized model computes: the layers before are quantized too. The float model is the
    reference throughout.

    Args:
      network: any Linen module, or a `Network`.
      variables: those that are quantized.
      qparams: the quantizers.
      batches: inputs of the model, as of `calibrate`.
      target: the float model's, where methods have changed `variables` since (rounded weights);
        None: `variables`.

    Raises:
      ValueError: no batches, or an empty one.
    """
    batches = list(as_batches(batches, "sqnr"))
    network, variables = as_network(network), unboxed(variables)
    clean = variables if target is None else unboxed(target)
    layers, (energies, (outputs,), _) = measure_energies(
        network, [(clean, (variables, qparams))], batches
    )
    weights, inputs = _weights(clean, variables, qparams, layers), {}
    for (path, operand), energy in _inputs(network, clean, qparams, layers, batches).items():
        inputs.setdefault(path, {})[operand] = energy
    rows = {}
    for name, path, index in list_places(layers):
        pick = lambda pair, index=index: decibel(*(part[index] for part in pair))
        (output,) = energies[path]
        rows[name] = LayerSqnr(
            bits="W{}A{}".format(*layer_bits(qparams, path)) if path in qparams else "",
            weights=pick(weights[path]) if path in weights else None,
            inputs={operand: pick(pair) for operand, pair in inputs.get(path, {}).items()},
            output=pick(output),
            signal=float(output[0][index]),
        )
    return Sqnr(layers=rows, output=decibel(*outputs), signal=float(outputs[0]))


Energies = tuple[np.ndarray, np.ndarray]  # signal, noise: [*stack]


def _weights(
    clean: Variables, variables: Variables, qparams: QParams, layers: Mapping[str, LayerInfo]
) -> dict[str, Energies]:
    energies = {}
    for path, quantizers in qparams.items():
        if "weights" not in quantizers:
            continue
        layer = layers[path]
        tensor = lambda tree, layer=layer: at_path(tree["params"], layer.path)[layer.weight_name]
        weight = jnp.asarray(tensor(clean), jnp.float32)
        noise = fake_quantize(jnp.asarray(tensor(variables)), quantizers["weights"]) - weight
        axes = tuple(range(len(layer.stack), weight.ndim))
        energies[path] = tuple(
            np.asarray(jnp.square(part).sum(axes), np.float64) for part in (weight, noise)
        )
    return energies


def _inputs(
    network: Network | nn.Module,
    variables: Variables,
    qparams: QParams,
    layers: Mapping[str, LayerInfo],
    batches: Sequence[Inputs],
) -> dict[Key, Energies]:
    states = {}
    for path, quantizers in qparams.items():
        for operand in quantizers.keys() - {"weights"}:
            zeros = jnp.zeros(layers[path].stack)
            states[path, operand] = (zeros, zeros, quantizers[operand])
    seen = observe(network, variables, {}, dict.fromkeys(states, _add_energy), states, batches)
    return {
        key: tuple(np.asarray(part, np.float64) for part in seen[key][:2]) for key in sorted(seen)
    }


def _add_energy(state: Any, x: Array, counts: Array | None) -> Any:
    """A watcher: what an input is, and what rounding changes of it."""
    signal, noise, quantizer = state
    x = x.astype(jnp.float32)
    change = fake_quantize(x, quantizer) - x
    return signal + jnp.square(x).sum(), noise + jnp.square(change).sum(), quantizer


def warn_of_noise(
    network: Network | nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Inputs,
    *,
    target: Variables | None = None,
    where: str = "calibrate",
) -> None:
    """Warns if the model's output, or a layer's, is under `LOW` dB on a batch; says what to try.

    `target` is the float model, see `sqnr`; `where` says in the message who warns.
    """
    if not qparams:
        return
    clean = variables if target is None else target
    layers, (energies, (outputs,), _) = measure_energies(
        as_network(network), [(clean, (variables, qparams))], as_batches([inputs], where)
    )
    ratios = (
        (decibel(energies[path][0][0][index], energies[path][0][1][index]), name)
        for name, path, index in list_places(layers)
    )
    low = sorted((ratio, name) for ratio, name in ratios if ratio < LOW)
    output = decibel(*outputs)
    if not low and not output < LOW:
        return
    named = [f"{name!r} {ratio:.1f} dB" for ratio, name in low[:SHOWN]]
    if len(low) > SHOWN:
        named.append(f"and {len(low) - SHOWN} more")
    logging.warning(
        "%s: signal to quantization noise of the model's outputs: %.1f dB; layers under %g dB: %s. "
        "Try %s. quantize.sqnr has the table.",
        *(where, output, LOW, ", ".join(named) or "none", REMEDIES),
    )
