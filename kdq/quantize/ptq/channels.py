"""Factors that move from the channels of one layer into the weights of others.

A producer makes channels; each of its consumers has inputs that are proportional to them. A factor
in the producer, and its inverse in the consumers, leave the model's function as it is. `rescale`
finds them. All of this is NumPy: there is little to compute, and nothing worth compiling.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kdq.quantize.layers import LayerInfo
from kdq.quantize.paths import at_path, copied, has_path
from kdq.quantize.ptq import matrices
from kdq.types import Array, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Producer:
    """A layer or a normalization, and the channels that it makes."""

    path: str
    channels: int  # of one layer of a stack
    stack: tuple[int, ...] = ()
    layer: LayerInfo | None = None  # None: a normalization
    # The folded batch norm that adds to the layer's outputs, and nothing else; None if none does.
    norm: str | None = None

    @property
    def factors(self) -> int:
        """Channels of the whole stack."""
        return int(np.prod(self.stack, dtype=int)) * self.channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consumer:
    """A layer whose inputs are channels of a producer."""

    layer: LayerInfo
    # [*stack, input channels] int: the producer's channel (of its whole stack) that each input is
    # proportional to; -1 where it is none.
    channel: np.ndarray

    def inputs(self, factors: np.ndarray) -> np.ndarray:
        """The factor of each input channel: [*stack, input channels]; 1 where there is none."""
        factors = np.asarray(factors, np.float32)
        return np.where(self.channel >= 0, factors[self.channel], np.float32(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescaling:
    """A producer with all of its consumers."""

    producer: Producer
    consumers: tuple[Consumer, ...]

    def largest(self, values: Sequence[Array]) -> np.ndarray:
        """By channel of the producer, the largest of `values` >= 0, an array a consumer."""
        most = np.zeros(self.producer.factors, np.float32)
        for consumer, array in zip(self.consumers, values, strict=True):
            used = consumer.channel >= 0
            np.maximum.at(most, consumer.channel[used], np.asarray(array)[used])
        return most


def rescale(variables: Variables, rescaling: Rescaling, factors: np.ndarray) -> Variables:
    """The producer's channels times `factors`, and the consumers' weights divided by them.

    `factors` are [producer.factors], positive. What changed is NumPy arrays.
    """
    factors = np.asarray(factors, np.float32)
    variables = _produce(variables, rescaling.producer, factors)
    for consumer in rescaling.consumers:
        layer = consumer.layer
        form = matrices.form(layer)
        divide = lambda w, f, form=form: matrices.scaled(w, form, form.channels, 1 / f)
        weight = np.asarray(matrices.weight_of(variables, layer))
        weight = _each(divide, layer.stack, weight, consumer.inputs(factors))
        variables = matrices.replaced(variables, layer.path, **{layer.weight_name: weight})
    return variables


def output_axes(layer: LayerInfo, form: matrices.Form) -> matrices.Axes:
    """Axes of the split weight that make its channels; a lookup's are inputs of the product."""
    return form.channels if layer.kind == "Embed" else (*form.groups, *form.outputs)


def output_reach(variables: Variables, producer: Producer) -> np.ndarray:
    """Largest absolute weight of each output channel of a layer: [producer.factors]."""
    form = matrices.form(producer.layer)
    reach = lambda w: matrices.reach(w, form, output_axes(producer.layer, form))
    weight = np.asarray(matrices.weight_of(variables, producer.layer))
    return _each(reach, producer.stack, weight).reshape(-1)


def input_reach(variables: Variables, consumer: Consumer) -> np.ndarray:
    """Largest absolute weight of each input channel: [*stack, input channels]."""
    form = matrices.form(consumer.layer)
    reach = lambda w: matrices.reach(w, form, form.channels)
    weight = np.asarray(matrices.weight_of(variables, consumer.layer))
    return _each(reach, consumer.layer.stack, weight)


def _produce(variables: Variables, producer: Producer, factors: np.ndarray) -> Variables:
    """The producer's channels, and with them what is added to them, times `factors`."""
    params = at_path(variables["params"], producer.path)
    factors = factors.reshape(*producer.stack, producer.channels)
    flat = ("scale", "bias") if producer.layer is None else ("bias",)
    changed = {
        n: np.asarray(params[n]) * factors.reshape(params[n].shape) for n in flat if n in params
    }
    if producer.layer is not None:
        form = matrices.form(producer.layer)
        axes = output_axes(producer.layer, form)
        multiply = lambda w, f: matrices.scaled(w, form, axes, f)
        weight = np.asarray(matrices.weight_of(variables, producer.layer))
        changed[producer.layer.weight_name] = _each(multiply, producer.stack, weight, factors)
    changed = {name: value.astype(params[name].dtype) for name, value in changed.items()}
    variables = matrices.replaced(variables, producer.path, **changed)
    return variables if producer.norm is None else _shift(variables, producer.norm, factors)


def _shift(variables: Variables, path: str, factors: np.ndarray) -> Variables:
    """The mean and the bias of a folded batch norm times `factors`."""
    shifted = dict(variables)
    for collection, name in (("batch_stats", "mean"), ("params", "bias")):
        changed = dict(variables[collection])
        if has_path(changed, path):
            arrays = copied(changed, path, "the norm")
            if name in arrays:
                old = np.asarray(arrays[name])
                arrays[name] = (old * factors.reshape(old.shape)).astype(old.dtype)
        shifted[collection] = changed
    return shifted


def _each(function: Callable, stack: tuple[int, ...], *arrays: np.ndarray) -> np.ndarray:
    """`function` of the arrays of each layer of a stack."""
    layers = zip(*(a.reshape(-1, *a.shape[len(stack) :]) for a in arrays), strict=True)
    results = np.stack([function(*layer) for layer in layers])
    return results.reshape(*stack, *results.shape[1:])
