"""Every quantizer that a policy may choose, stacked: choosing is indexing, never recompiling."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdq import quantize
from kdq.config import parse_bits
from kdq.quantize import Network, Observer, Quantizer
from kdq.quantize.inputs import Batch
from kdq.quantize.layers import FLOAT_BITS
from kdq.types import Array, QParams, Variables

Choices = Mapping[str, tuple[str, ...]]  # {layer path: ("W4A8", "W8A8", ...)}; "" is float
# {path: {operand: a quantizer with an axis of choices in front}}; the last one leaves as it is.
Bank = QParams


def fill(
    network: Network | nn.Module,
    variables: Variables,
    choices: Choices,
    images: Sequence[Batch],
    observer: Observer,
    *,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, description: items,
) -> Bank:
    """Returns a model's quantizers, calibrated at every choice of the layers that are searched.

    `images` are batches of one shape, `observer` is that of weights and inputs alike.
    """
    calibrate = lambda rules: quantize.calibrate(network, variables, rules, images, check=False)
    calibrated: dict[str, QParams] = {"": {}}
    every = list(dict.fromkeys(bits for layer in choices.values() for bits in layer if bits))
    for bits in progress(every, "calibrating"):
        calibrated[bits] = calibrate(quantize.uniform_rules(*parse_bits(bits), observer=observer))
    ranges = calibrate(quantize.uniform_rules(8, 8))  # by the largest
    bank: Bank = {}
    for path, layer in choices.items():
        bank[path] = {}
        for operand, reach in ranges[path].items():
            identity = identity_quantizer(reach)
            chosen = [calibrated[bits].get(path, {}).get(operand, identity) for bits in layer]
            bank[path][operand] = jax.tree.map(lambda *x: jnp.stack(x), *chosen, identity)
    return bank


def identity_quantizer(quantizer: Quantizer) -> Quantizer:
    """Returns a quantizer that changes nothing but the last bits of a float32.

    Codes of 24 bits over 16 times the range of `quantizer`: the error is at most 2^-20 of that
    range, and values that were not seen in calibration are not clipped.
    """
    most, codes = jnp.float32(2**23), jnp.maximum(quantizer.qmax, -quantizer.qmin)
    ones = [1] * (quantizer.scale.ndim - codes.ndim)
    reach = 16 * quantizer.scale * codes.reshape(*codes.shape, *ones)
    return quantizer.replace(
        scale=reach / most,
        zero_point=jnp.zeros_like(quantizer.zero_point),
        qmin=jnp.full_like(quantizer.qmin, -most),
        qmax=jnp.full_like(quantizer.qmax, most),
    )


def choose(bank: Bank, chosen: Mapping[str, Array]) -> QParams:
    """Returns the quantizers of a policy, {layer path: place of its choice}; may be traced."""
    return {
        path: jax.tree.map(lambda array, i=chosen[path]: array[i], quantizers)
        for path, quantizers in bank.items()
    }


def bits_of(choice: str) -> tuple[int, int]:
    """Returns the bits of weights and inputs: (4, 8) of "W4A8"; 32 for float."""
    weights, activations = parse_bits(choice)
    return weights or FLOAT_BITS, activations or FLOAT_BITS


def to_rules(chosen: Mapping[str, str], observer: str) -> tuple[dict[str, Any], ...]:
    """Returns an arm's `config.rules` for a policy: {layer path: "W4A8"}."""
    rules = []
    for path, choice in chosen.items():
        entry: dict[str, Any] = {"path": re.escape(path)}
        kinds = {"weights": "per_channel", "activations": "per_tensor"}
        for (tensor, granularity), bits in zip(kinds.items(), parse_bits(choice), strict=True):
            if bits:
                entry[tensor] = {"bits": bits, "granularity": granularity, "observer": observer}
        rules.append(entry)
    return tuple(rules)
