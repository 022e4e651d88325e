"""Integer codes with what they stand for: what is left of a weight, and of a layer's input."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize import grid
from kdq.quantize.grid import Quantizer
from kdq.quantize.kinds import Unsupported
from kdq.types import Array


class QTensor(flax.struct.PyTreeNode):
    """A weight as integers: code `q` stands for `(q - zero_point) * scale`, or `levels[q] * scale`.

    Invariants: `codes` have the smallest of the dtypes int2, int4 and int8 that holds them (uint8
    with `levels`); `scale` is positive float32 and aligns with the codes as in `kdq.quantize.grid`;
    `zero_point` is None, which is 0, or int32 of the shape of `scale`; `levels` are None, or
    float32 [levels], ascending. Of a stack of layers every array has the stack's axes in front.
    """

    codes: Array
    scale: Array
    zero_point: Array | None = None
    levels: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.codes.shape

    def dequantize(self) -> Array:
        """Returns the float32 weight, of one layer, not of a stack."""
        scale = grid.expand(self.scale, self.codes.shape)
        if self.levels is not None:
            return self.levels[self.codes.astype(jnp.int32)] * scale
        codes = self.codes.astype(jnp.float32)
        if self.zero_point is not None:
            codes = codes - grid.expand(self.zero_point.astype(jnp.float32), codes.shape)
        return codes * scale

    def rows(self, indices: Array) -> Array:
        """Returns some of the rows along the first axis, float32 [*indices, ...]."""
        pick = lambda array: array if array is None or array.shape[0] == 1 else array[indices]
        codes = self.codes[indices]
        # A scale of the whole table has one row, and its axes are then the last of the result's.
        return QTensor(codes, pick(self.scale), pick(self.zero_point), self.levels).dequantize()


class InputGrid(flax.struct.PyTreeNode):
    """The codes of a layer's input, uint8: code `q` stands for `(q - zero_point) * scale`.

    Invariants: `scale` is positive float32, `zero_point` and `top` int32, with
    0 <= zero_point <= top <= 255; scalars, or of the shape of a stack of layers. Codes go from 0 to
    `top`, signed grids are moved up by their smallest code.
    """

    scale: Array
    zero_point: Array
    top: Array


def from_quantizer(weight: Array, quantizer: Quantizer) -> QTensor:
    """Returns the weight in the codes of its quantizer.

    One signed bit becomes the codes -1 and 1, at half the scale; unsigned codes are moved down to
    fit a signed dtype, and their zero point with them. `weight`: [*stack, ...] float.
    """
    codes, scale = map(np.asarray, codes_and_scale(weight, quantizer))
    if quantizer.levels is not None:
        weight = QTensor(codes.astype(np.uint8), scale, levels=quantizer.levels)
        return jax.tree.map(jnp.asarray, weight)
    zero_point = np.asarray(quantizer.zero_point)
    if (zero_point == 0.5).any():  # one signed bit; a channel of zeros has the zero point 0
        expand = lambda c, q: jnp.broadcast_to(grid.expand(q.zero_point, c.shape), c.shape)
        codes = 2 * codes - 2 * np.asarray(grid.over_stack(expand, quantizer)(codes, quantizer))
        scale, zero_point = scale / 2, np.zeros_like(zero_point)
    elif (np.asarray(quantizer.qmin) == 0).all():
        half = np.float32(2 ** (grid.bits(quantizer) - 1))
        codes, zero_point = codes - half, zero_point - half
    zero_point = zero_point.astype(np.int32) if zero_point.any() else None
    return jax.tree.map(jnp.asarray, QTensor(_smallest(codes), scale, zero_point))


@jax.jit
def codes_and_scale(weight: Array, quantizer: Quantizer) -> tuple[Array, Array]:
    """Returns the codes of a weight, as float32, and its scale as its format holds it."""
    rounded_scale = lambda _, q: grid.with_rounded_scale(q).scale
    by_layer = lambda function: grid.over_stack(function, quantizer)(weight, quantizer)
    return by_layer(grid.to_codes), by_layer(rounded_scale)


def input_grid(quantizer: Quantizer) -> InputGrid:
    """Returns the codes of an input. Raises Unsupported without integers and one fixed scale."""
    if quantizer.levels is not None:
        raise Unsupported("its input is quantized to a number format, not to integers")
    if quantizer.dynamic is not None:
        raise Unsupported("the scale of its input is computed anew from each tensor")
    stack = np.shape(quantizer.qmin)
    if np.shape(quantizer.scale) != stack:
        raise Unsupported("its input has a scale for each channel: they can't share a sum")
    scale = quantizer.scale
    if quantizer.scale_format:
        scale = codes_and_scale(jnp.zeros(stack), quantizer)[1]
    zero_point, qmin, qmax = (
        np.asarray(v) for v in (quantizer.zero_point, quantizer.qmin, quantizer.qmax)
    )
    is_sign = zero_point == 0.5
    if is_sign.any():  # codes 0 and 2 around 1 would need a gap
        raise Unsupported("its input is a sign: the zero point is between two codes")
    moved = [jnp.asarray(v - qmin, jnp.int32) for v in (zero_point, qmax)]
    return InputGrid(jnp.asarray(scale, jnp.float32), *moved)


def scaled(weight: QTensor, factor: np.ndarray) -> QTensor:
    """Returns the weight times a factor for each channel; a negative one turns its codes around.

    `factor` is float64 and broadcasts with the scale. Raises Unsupported for a negative factor of a
    code of -128, or of integers with a zero point.
    """
    codes, zero = np.asarray(weight.codes, np.int16), factor == 0
    if weight.zero_point is not None and (factor <= 0).any():
        raise Unsupported("a norm turns a weight with a zero point around")
    sign = np.where(factor < 0, -1, np.where(zero, 0, 1))
    codes = codes * np.broadcast_to(sign, codes.shape).astype(np.int16)
    if codes.max(initial=0) > 127:
        raise Unsupported("a norm turns the code -128 around, and there is no 128")
    scale = np.asarray(weight.scale, np.float64) * np.where(zero, 1, abs(factor))
    zero_point = weight.zero_point
    if zero_point is not None:
        zero_point = np.broadcast_to(np.asarray(zero_point), scale.shape)
    turned = QTensor(_smallest(codes), scale.astype(np.float32), zero_point)
    return jax.tree.map(jnp.asarray, turned)


def _smallest(codes: np.ndarray) -> np.ndarray:
    low, high = codes.min(initial=0), codes.max(initial=0)
    for bits, dtype in ((2, jnp.int2), (4, jnp.int4)):
        if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
            return codes.astype(np.int8).astype(dtype)
    return codes.astype(np.int8)
