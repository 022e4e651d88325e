"""The mean error that quantization adds to each output channel, taken out of the bias."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo, list_layers
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import at_path, copied
from kdq.quantize.ptq.norms import Norm, list_norms
from kdq.quantize.ptq.options import Progress, ptq_method, quiet
from kdq.quantize.ptq.units import in_order, stack_roots
from kdq.quantize.ptq.watch import output_channels, outputs_of
from kdq.types import Array, QParams, Variables


@ptq_method()
def bias_correction(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    target: Variables | None = None,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """Makes the mean output of every quantized layer that of the float model.

    bias += E[y] - E[ŷ] for each output channel, over all examples and positions; y is the output
    of the layer in the float model, ŷ in the quantized one (arXiv:1906.04721, §4.2, with the
    expectation measured). In the order in which layers run, each after those before it are
    corrected; of an `nn.scan` one layer of the stack after the other. That is one run over the
    batches a layer.

    A layer without a bias that goes into a batch norm has it corrected there: mean -= E[y] - E[ŷ],
    which shifts the output as a bias would, and which a later `reestimate` replaces, not doubles.
    What has neither (Embed, products of activations, layers with `use_bias=False`) is left as it
    is, with a log line.

    Arguments, returns and errors: see `options.ptq_method`.
    """
    inputs = batches[0]
    layers = list_layers(network, variables, inputs)
    norms = {}
    if "batch_stats" in variables:
        listed = list_norms(network, variables, inputs)
        norms = {norm.source: norm for norm in listed.values() if norm.source}
    biases = {}
    for path in (path for path in layers if qparams.get(path)):
        shifted = _shifted(layers[path], norms.get(path), variables)
        if isinstance(shifted, str):
            logging.warning("bias_correction: %r stays as it is: %s", path, shifted)
        else:
            biases[path] = shifted
    if not biases:
        logging.warning("bias_correction: no quantized layer has a bias to correct")
        return variables, qparams
    kept = tuple((path, tuple(output_channels(layers[path]))) for path in biases)
    run = partial(_mean_outputs, network, batches=batches, kept=kept)
    expected = run(variables if target is None else target, {})
    order = in_order(
        {path: layers[path].stack for path in biases},
        stack_roots(network, variables, inputs),
    )
    for path, index in progress(list(order), "bias_correction"):
        error = np.zeros_like(expected[path])
        error[index] = (expected[path] - run(variables, qparams)[path])[index]
        variables = biases[path].shifted(variables, error)
    return variables, qparams


@dataclasses.dataclass(frozen=True)
class _Bias:
    """An array that a layer's outputs are shifted by."""

    collection: str
    path: str
    name: str
    sign: int

    def shifted(self, variables: Variables, error: np.ndarray) -> Variables:
        changed = dict(variables[self.collection])
        arrays = copied(changed, self.path, "biases")
        old = arrays[self.name]
        arrays[self.name] = jnp.asarray(np.float64(old) + self.sign * error, old.dtype)
        return {**variables, self.collection: changed}


def _shifted(layer: LayerInfo, norm: Norm | None, variables: Variables) -> _Bias | str:
    """Returns the bias to correct, or the reason why there is none."""
    channels = output_channels(layer)
    if not channels:
        return f"{layer.kind} has no bias"
    if "bias" in at_path(variables["params"], layer.path):
        return _Bias("params", layer.path, "bias", 1)
    if norm is None:
        return "it has no bias, and its output goes into no batch norm alone"
    if norm.axes != tuple(channels) or norm.stack != layer.stack:
        return f"it has no bias, and norm {norm.path!r} does not have its channels"
    return _Bias("batch_stats", norm.path, "mean", -1)


def _mean_outputs(network, variables, qparams, *, batches, kept) -> dict[str, np.ndarray]:
    """{path: [*stack, *channels] float64}: the mean output of each channel over all batches."""
    sums: dict[str, Any] = {}
    for inputs in batches:
        batch_sums = _batch_sums(variables, qparams, inputs, network=network, kept=kept)
        for path, calls in batch_sums.items():
            for call in calls:
                call = [np.asarray(v, np.float64) for v in call]
                before = sums.get(path, (0.0, 0.0))
                sums[path] = tuple(a + b for a, b in zip(before, call, strict=True))
    means = {}
    for path, (total, elements) in sums.items():
        means[path] = total / elements.reshape(*elements.shape, *[1] * (total.ndim - elements.ndim))
        if not np.isfinite(means[path]).all():
            raise ValueError(f"bias_correction met NaN or infinity in the output of layer {path!r}")
    return means


@partial(jax.jit, static_argnames=("network", "kept"))
def _batch_sums(variables, qparams, inputs, *, network, kept):
    """{path: ((sum of the outputs of each channel, how many each is of), ...)}, an entry a call."""

    def sums(output: Array, counts: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
        others = tuple(i for i in range(output.ndim) if i - output.ndim not in axes)
        # Of a mean: a sum over many positions would lose digits.
        where = None if counts is None else jnp.broadcast_to(counts, output.shape)
        mean = output.astype(jnp.float32).mean(others, where=where)
        size = output.size if where is None else where.sum()
        elements = jnp.float32(size / mean.size)
        return mean * elements, elements

    takes = {path: partial(sums, axes=axes) for path, axes in kept}
    return outputs_of(network, Weights(variables=variables, qparams=qparams), inputs, takes)[1]
