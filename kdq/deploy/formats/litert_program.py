"""A program on its way to LiteRT: products in the forms that its converter gets right."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from kdq.deploy import contraction, jaxprs, primitives
from kdq.deploy.contraction import Conv, Dot, Kernel
from kdq.deploy.formats import rounded
from kdq.deploy.qtensor import QTensor
from kdq.types import Array

# The least normal number: to add it changes no number, and the converter, which lets a rounding
# move back through operations that move numbers, stops at an addition.
LEAST = np.finfo(np.float32).tiny
MOST_AXES = 3  # of an array that a matrix multiplies


def set_apart(x: Array) -> Array:
    """Returns an array that nothing before is rounded for: its rounding stays where it is written.

    The converter would round what a maximum, a mean or a concatenation is made of, to the grid of
    the result, and with it all else that takes it.
    """
    return x + LEAST


def product(kernel: Kernel, x: Array, w: Array) -> Array:
    """Returns the product of two arrays of floats."""
    if isinstance(kernel, Conv):
        return _convolution(kernel, x, w)
    (summed, shared) = kernel.dimension_numbers
    last = x.ndim - 1
    if x.ndim > MOST_AXES and w.ndim == 2 and summed == ((last,), (0,)) and shared == ((), ()):
        # Its product of a matrix and rows loses count of axes of one element, unless what is added
        # to it keeps the reshapes away.
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        total = rounded.product(Dot((((1,), (0,)), ((), ())), 2), rows, w) + LEAST
        return total.reshape(*x.shape[:-1], w.shape[1])
    return rounded.product(kernel, x, w)


def _convolution(kernel: Conv, x: Array, w: Array) -> Array:
    """Computes a transposed one whole, then cuts it: LiteRT pads these in another way."""
    if set(kernel.input_dilation) == {1}:
        return rounded.product(kernel, x, w)
    numbers = kernel.dimension_numbers
    sizes = [w.shape[axis] for axis in numbers.rhs_spec[2:]]
    reach = [(size - 1) * step for size, step in zip(sizes, kernel.kernel_dilation, strict=True)]
    whole = [
        (max(low, most), max(high, most))
        for (low, high), most in zip(kernel.padding, reach, strict=True)
    ]
    if set(kernel.strides) != {1}:
        whole = list(kernel.padding)
    total = rounded.product(dataclasses.replace(kernel, padding=tuple(whole)), x, w)
    for axis, kept, padded in zip(numbers.out_spec[2:], kernel.padding, whole, strict=True):
        low, high = padded[0] - kept[0], padded[1] - kept[1]
        total = lax.slice_in_dim(total, low, total.shape[axis] - high, axis=axis)
    return total


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    """Runs an equation in a form that the converter gets right."""
    if any(isinstance(value, jax.core.Tracer) for value in values):
        if eqn.primitive.name == "conv_general_dilated":
            if eqn.params["batch_group_count"] == 1:
                return [product(contraction.conv(eqn.params), *values)]
        elif eqn.primitive.name == "dot_general":
            kernel = Dot(eqn.params["dimension_numbers"], eqn.invars[0].aval.ndim)
            return [product(kernel, *values)]
        elif eqn.primitive is primitives.rows.primitive:
            return [_rows(*jax.tree.unflatten(eqn.params["structure"], values))]
    return jaxprs.bind(eqn, values)


def _rows(indices: Array, table: QTensor) -> Array:
    """Returns rows of a table of 8 bits: LiteRT looks up no fewer."""
    with jax.ensure_compile_time_eval():
        table = table.replace(codes=table.codes.astype(jnp.int8))
    return table.rows(indices)
