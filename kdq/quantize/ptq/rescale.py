"""Which channels can be rescaled and leave the model's function as it is, found by trial.

A producer makes channels: a layer's outputs, or a normalization's scale and bias. If what it makes
reaches other layers with nothing on the way that a positive factor does not pass (ReLU, pooling, a
reshape, a concatenation; not GELU, not a residual sum), then the factor can be taken back in their
weights. No graph is read: the factor is put in, and what arrives is looked at.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.quantize import kinds
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Batch, Inputs, as_inputs, unboxed
from kdq.quantize.layers import LayerInfo, list_layers
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.observe import observe
from kdq.quantize.paths import at_path
from kdq.quantize.ptq import matrices
from kdq.quantize.ptq.channels import Consumer, Producer, Rescaling, output_axes, rescale
from kdq.quantize.ptq.norms import is_folded, list_norms
from kdq.quantize.ptq.options import Progress, quiet
from kdq.quantize.ptq.watch import output_channels
from kdq.quantize.walk import walk
from kdq.types import Array, Variables

BASE = 64  # values of a trial factor
TOLERANCE = 1e-3  # of its logarithm, base 2; two values are 2 / BASE apart


def find_rescalings(
    network: Network | nn.Module,
    variables: Variables,
    inputs: Batch,
    *,
    seed: int = 0,
    tolerance: float = 1e-4,
    progress: Progress = quiet,
) -> tuple[Rescaling, ...]:
    """Every producer whose channels can be rescaled, in the order in which they first run.

    Trials: the producer's parameters, with a little noise so that no channel is silent, once as
    they are and once negated, so that each passes a ReLU one time. Its channels get factors that
    spell their number, and each layer's input shows by the ratio of its energy which channel it is.
    The first layer that is found takes the factors back, and the search goes on for the others.
    What is found is verified: with random factors of 1/4 to 4, taken back, the model's own output
    must stay. What can't be rescaled is logged with the reason. The factors must stay positive.

    Args:
      network: any Linen module, or a `Network`.
      variables: its float variables.
      inputs: one batch.
      seed: of the trial factors.
      tolerance: largest change of an output in the verification, as a part of the largest output.
      progress: `progress(producer paths, description)` yields the paths.

    Raises:
      ValueError: NaN or infinity in a layer's input; names the layer.
    """
    network, variables, inputs = as_network(network), unboxed(variables), as_inputs(inputs)
    trial = _Trial(network, variables, inputs, np.random.default_rng(seed))
    matrices.check_finite(trial.energies(variables), "the search for channels")
    producers = _producers(network, variables, inputs, trial.layers)
    rescalings = []
    for path in progress(list(producers), "channels to rescale"):
        consumers, reason = trial.consumers(producers[path])
        if not reason:
            rescaling = Rescaling(producer=producers[path], consumers=tuple(consumers))
            error = trial.error(rescaling)
            if error <= tolerance:
                rescalings.append(rescaling)
                continue
            reason = f"the model's output changes by {error:.1e}"
        logging.info("the channels of %r can't be rescaled: %s", path, reason)
    return tuple(rescalings)


def _producers(
    network: Network,
    variables: Variables,
    inputs: Inputs,
    layers: Mapping[str, LayerInfo],
) -> dict[str, Producer]:
    """Layers with a weight, and normalizations with a scale, in the order in which they first run.

    A folded batch norm is part of the layer that it follows. Others are logged.
    """
    producers: dict[str, Producer | None] = {}

    def record(call: ModuleCall, extras: Any) -> tuple[Any, Any]:
        outputs, path = call.run(), call.path
        if path not in producers and call.method == "__call__":
            if path in layers and layers[path].weight_name:
                producers[path] = _layer_producer(layers[path])
            elif isinstance(call.module, kinds.NORMS):
                producers[path] = _norm_producer(call.module, path, variables)
        return outputs, extras

    def forward(variables: Variables, inputs: Inputs) -> Any:
        return walk(network, Weights(variables=variables, qparams={}), inputs, record)[0]

    jax.eval_shape(forward, variables, inputs)
    scalable = {path: producer for path, producer in producers.items() if producer is not None}
    if "batch_stats" in variables:
        for norm in list_norms(network, variables, inputs).values():
            if norm.source not in scalable or not is_folded(norm, variables):
                continue
            layer = layers[norm.source]
            if norm.axes == tuple(output_channels(layer)) and norm.stack == layer.stack:
                scalable[norm.source] = dataclasses.replace(scalable[norm.source], norm=norm.path)
                scalable.pop(norm.path, None)
    return scalable


def _layer_producer(layer: LayerInfo) -> Producer | None:
    try:
        form = matrices.form(layer)
    except kinds.Unsupported as error:
        logging.info("the channels of %r can't be rescaled: %s", layer.path, error)
        return None
    channels = form.size(output_axes(layer, form))
    return Producer(path=layer.path, channels=channels, stack=layer.stack, layer=layer)


def _norm_producer(module: nn.Module, path: str, variables: Variables) -> Producer | None:
    if not module.has_variable("params", "scale"):
        logging.info("the channels of %r can't be rescaled: it has no scale", path)
        return None
    shape = module.get_variable("params", "scale").shape
    whole = at_path(variables["params"], path)["scale"].shape
    stack = whole[: len(whole) - len(shape)]
    return Producer(path=path, channels=int(np.prod(shape, dtype=int)), stack=stack)


def _energy(state: Array, x: Array) -> Array:
    return state + jnp.square(x).sum(1)


class _Trial:
    """Runs the model with changed parameters on one batch; compiled once."""

    def __init__(self, network: Network, variables: Variables, inputs: Inputs, rng: Any):
        self.network, self.variables, self.inputs, self.rng = network, variables, inputs, rng
        self.layers = list_layers(network, variables, inputs)
        self.watched, self.watchers, self.states = {}, {}, {}
        for path, layer in self.layers.items():
            if not layer.weight_name or "activations" not in layer.operands:
                continue
            try:
                form = matrices.form(layer)
            except kinds.Unsupported:
                continue  # if factors reach it, the verification fails
            self.watched[path] = layer
            key = (path, "activations")
            self.watchers[key] = matrices.ByChannel(layer, _energy)
            self.states[key] = jnp.zeros((*layer.stack, form.size(form.channels)))

    def energies(self, variables: Variables) -> dict[str, np.ndarray]:
        """Sum of squares of each channel of each layer's input: [layers of the stack, channels]."""
        seen = observe(self.network, variables, {}, self.watchers, self.states, [self.inputs])
        return {
            path: np.asarray(state, np.float64).reshape(-1, state.shape[-1])
            for (path, _), state in seen.items()
        }

    def error(self, rescaling: Rescaling) -> float:
        """Change of the model's own output with random factors, as a part of its largest."""
        factors = 4.0 ** self.rng.uniform(-1, 1, rescaling.producer.factors)
        outputs = partial(_outputs, inputs=self.inputs, network=self.network)
        before = outputs(self.variables)
        after = outputs(rescale(self.variables, rescaling, factors))
        worst = 0.0
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                change = np.abs(a - b).max() / np.abs(a).max()
            worst = max(worst, float(np.nan_to_num(change, nan=np.inf)))
        return worst

    def consumers(self, producer: Producer) -> tuple[list[Consumer], str]:
        """All layers that take the producer's channels, or why there are none to use."""
        codes = _codes(producer.factors, self.rng)
        noisy = self._noisy(producer)
        maps: dict[str, np.ndarray] = {}
        base = self._seen(noisy, producer, maps, np.ones(producer.factors))
        while True:
            logs = []
            for digits in codes:
                seen = self._seen(noisy, producer, maps, _factor(digits))
                # The factor that came with an input, as a logarithm base 2; NaN if all is 0.
                with np.errstate(divide="ignore", invalid="ignore"):
                    logs.append({path: np.log2(seen[path] / base[path]) / 2 for path in seen})
            changed = ""
            for path in self.watched:
                rows = _read(np.stack([log[path] for log in logs]), codes)
                known = maps.get(path, np.full_like(rows, -1))
                moved = (rows != known).any(1)  # by what is not taken back in its weight
                changed = changed or (path if moved.any() else "")
                # An input that stays 0 hides which channel it is.
                clean = moved & ((rows >= -1) & (known < 0) & (base[path] > 0)).all(1)
                if clean.any():
                    maps[path] = np.where(clean[:, None], rows, known)
                    break
            else:
                break
        if changed:
            return [], f"the input of {changed!r} does not scale with them one by one"
        if not maps:
            return [], "no layer takes them"
        return self._consumers_of(maps), ""

    def _consumers_of(self, maps: Mapping[str, np.ndarray]) -> list[Consumer]:
        return [
            Consumer(
                layer=self.watched[path],
                channel=rows.reshape(*self.watched[path].stack, rows.shape[-1]),
            )
            for path, rows in maps.items()
        ]

    def _noisy(self, producer: Producer) -> list[Variables]:
        """The variables with a producer none of whose channels is silent, and with it negated."""
        params = at_path(self.variables["params"], producer.path)
        names = ("scale",) if producer.layer is None else (producer.layer.weight_name,)
        noisy = {}
        for name in (*names, *(n for n in ("bias",) if n in params)):
            value = np.asarray(params[name], np.float32)
            size = np.sqrt(np.square(np.asarray(params[names[0]], np.float32)).mean()) or 0.1
            noisy[name] = value + 0.2 * size * self.rng.normal(size=value.shape)
        return [
            matrices.replaced(
                self.variables,
                producer.path,
                **{n: jnp.asarray(sign * v, params[n].dtype) for n, v in noisy.items()},
            )
            for sign in (1, -1)
        ]

    def _seen(self, noisy, producer, maps, factors) -> dict[str, np.ndarray]:
        """Energies of both signs with `factors` in, and taken back where `maps` says."""
        rescaling = Rescaling(producer=producer, consumers=tuple(self._consumers_of(maps)))
        both = [self.energies(rescale(each, rescaling, factors)) for each in noisy]
        return {path: both[0][path] + both[1][path] for path in both[0]}


def _codes(count: int, rng: np.random.Generator) -> np.ndarray:
    """A number for each channel, in digits of `BASE`: [digits, count]; one in 16 numbers is used.

    So an input that is none of the channels is hardly taken for one.
    """
    digits = 2
    while BASE**digits < 16 * count:
        digits += 1
    numbers = rng.choice(BASE**digits, count, replace=False)
    return np.stack([numbers // BASE**i % BASE for i in range(digits)])


def _factor(digits: np.ndarray) -> np.ndarray:
    """1/2 to 2, and never 1."""
    return 2.0 ** (2 * (digits + 0.5) / BASE - 1)


def _read(logs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The channel of each input: [rows, inputs]; -1: it did not change, -2: it is no channel.

    Args:
      logs: [digits, rows, inputs].
      codes: [digits, channels].
    """
    exact = (np.nan_to_num(logs, nan=9.0, posinf=9.0, neginf=9.0) + 1) * BASE / 2 - 0.5
    digits = np.rint(exact).astype(int)
    near = (np.abs(exact - digits) < TOLERANCE * BASE / 2).all(0)
    near &= ((digits >= 0) & (digits < BASE)).all(0)
    powers = BASE ** np.arange(len(codes))
    numbers, order = np.unique(np.tensordot(powers, codes, 1), return_index=True)
    read = np.tensordot(powers, digits, 1)
    place = np.minimum(np.searchsorted(numbers, read), len(numbers) - 1)
    channels = np.where(near & (numbers[place] == read), order[place], -2)
    still = (np.abs(logs) <= TOLERANCE) | np.isnan(logs)
    return np.where(still.all(0), -1, channels)


@partial(jax.jit, static_argnames=("network",))
def _outputs(variables, inputs, *, network):
    return network.run(Weights(variables=variables, qparams={}), inputs)[0]
