"""Every quantizer that a policy may choose, stacked: choosing is indexing, never recompiling."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdq import quantize
from kdq.config import parse_bits
from kdq.quantize import Observer, Quantizer
from kdq.quantize.layers import FLOAT_BITS
from kdq.types import Array, QParams, Variables

Choices = Mapping[str, tuple[str, ...]]  # {layer path: ("W4A8", "W8A8", ...)}; "" is float
# {path: {operand: a quantizer with an axis of choices in front}}; the last one leaves as it is.
Bank = QParams


def fill(
    model: nn.Module,
    variables: Variables,
    choices: Choices,
    images: Sequence[Array],
    observer: Observer,
    *,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, description: items,
) -> Bank:
    """Calibrates a model at every choice.

    Args:
      model: any Linen module with a `train` keyword.
      variables: float.
      choices: of the layers that are searched.
      images: batches to calibrate on, of one shape.
      observer: of weights and inputs alike.
      progress: a bar.
    """
    found = {}
    all_bits = list(dict.fromkeys(bits for own in choices.values() for bits in own if bits))
    for bits in progress(all_bits, "calibrating"):
        rules = quantize.uniform_rules(*parse_bits(bits), observer=observer)
        found[bits] = quantize.calibrate(model, variables, rules, images, check=False)
    ranges = quantize.uniform_rules(8, 8)  # by the largest
    float_ones = quantize.calibrate(model, variables, ranges, images, check=False)
    bank = {}
    for path, own in choices.items():
        bank[path] = {}
        for operand, reach in float_ones[path].items():
            as_it_is = transparent(reach)
            chosen = [found[b].get(path, {}).get(operand, as_it_is) if b else as_it_is for b in own]
            chosen.append(as_it_is)
            bank[path][operand] = jax.tree.map(lambda *arrays: jnp.stack(arrays), *chosen)
    return bank


def transparent(quantizer: Quantizer) -> Quantizer:
    """One that changes nothing but the last bits of a float32.

    Codes of 24 bits over 16 times the range of `quantizer`: the error is at most 2^-20 of that
    range, and what was not seen in calibration is not clipped.
    """
    most = jnp.float32(2**23)
    reach = (
        16
        * quantizer.scale
        * jnp.maximum(quantizer.qmax, -quantizer.qmin).reshape(
            *quantizer.qmax.shape, *[1] * (quantizer.scale.ndim - quantizer.qmax.ndim)
        )
    )
    return quantizer.replace(
        scale=reach / most,
        zero_point=jnp.zeros_like(quantizer.zero_point),
        qmin=jnp.full_like(quantizer.qmin, -most),
        qmax=jnp.full_like(quantizer.qmax, most),
    )


def choose(bank: Bank, chosen: Mapping[str, Array]) -> QParams:
    """The quantizers of a policy; may be traced.

    Args:
      bank: see `fill`.
      chosen: {layer path: int scalar}, the place of each layer's choice.
    """
    return {
        path: jax.tree.map(lambda array, i=chosen[path]: array[i], quantizers)
        for path, quantizers in bank.items()
    }


def bits_of(choice: str) -> tuple[int, int]:
    """ "W4A8" -> (4, 8); 32 for what stays in float."""
    weights, activations = parse_bits(choice)
    return weights or FLOAT_BITS, activations or FLOAT_BITS


def to_rules(chosen: Mapping[str, str], observer: str) -> tuple[dict[str, Any], ...]:
    """What an arm's `config.rules` says for a policy: {layer path: "W4A8"}."""
    found = []
    for path, choice in chosen.items():
        weights, activations = parse_bits(choice)
        entry: dict[str, Any] = {"path": re.escape(path)}
        if weights:
            entry["weights"] = {
                "bits": weights,
                "granularity": "per_channel",
                "observer": observer,
            }
        if activations:
            entry["activations"] = {
                "bits": activations,
                "granularity": "per_tensor",
                "observer": observer,
            }
        found.append(entry)
    return tuple(found)
