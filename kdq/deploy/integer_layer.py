"""A layer that multiplies integers, made from a float one and its quantizers."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdq.deploy import arithmetic, contraction
from kdq.deploy.contraction import BIAS, RESULT, WEIGHT, Kernel
from kdq.deploy.jaxprs import at_once
from kdq.deploy.qtensor import InputGrid, QTensor
from kdq.quantize import grid
from kdq.quantize.kinds import Unsupported
from kdq.types import Array

INT32 = 2**31 - 1


class IntegerLayer(flax.struct.PyTreeNode):
    """The arrays that an integer layer computes with; a stack of layers has its axes in front.

    All but `weight` broadcast with the output of the layer's product. No weight is float.
    """

    inputs: dict[str, InputGrid]  # by operand
    weight: QTensor | None = None  # None: a product of two inputs
    weight_scale: Array | None = None  # float32, of the weight
    weight_sum: Array | None = None  # int32, of the weight's codes
    weight_zero: Array | None = None  # int32, of the weight; None is 0
    bias: Array | None = None  # int32, at `scale`
    output: InputGrid | None = None  # of the codes to make; None: int32 sums

    @property
    def scale(self) -> Array:
        """The float32 scale of the int32 sums."""
        factors = [*[grid.scale for grid in self.inputs.values()], self.weight_scale]
        factors = [factor for factor in factors if factor is not None]
        return at_once(
            lambda *scales: arithmetic.exactly(functools.reduce(operator.mul, scales)), *factors
        )


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The change of a layer's bias by rounding it to int32."""

    added: np.ndarray  # float64, as it broadcasts with the result of the layer's product
    index: np.ndarray | None  # which element of the layer's own bias each is; None: it has none


class MadeLayer(NamedTuple):
    """An integer layer, not a stack of them."""

    layer: IntegerLayer
    largest: int  # a bound of its sums
    rounded: Rounded | None  # None: it has no bias


def make_integer_layer(
    traced: core.ClosedJaxpr,
    roles: Sequence[str],
    inputs: Mapping[str, InputGrid],
    weight: QTensor | None,
    bias: np.ndarray | None,
    offset: np.ndarray | None = None,
) -> MadeLayer:
    """Makes one layer, not a stack of them.

    Args:
      traced: the layer's own code in floats.
      roles: of its arguments.
      inputs: the grids of its inputs.
      weight: its weight; None for a product of two inputs.
      bias: float, one of the arguments; None if it has none.
      offset: float, which broadcasts with the layer's output, to be added if there is no bias.

    Raises:
      Unsupported: why it can't be computed with integers.
    """
    # Take the weight and the bias to where they meet the input.
    products, biases = [], [(None, None)]

    def multiply(kernel: Kernel, left: Any, right: Any) -> None:
        if products:
            raise Unsupported("it multiplies more than once")
        products.append((kernel, right and {k: np.asarray(array) for k, array in right.items()}))

    arrays = {} if weight is None else {WEIGHT: _unpack(weight)}
    if bias is not None:
        arrays[BIAS] = np.float32(bias), np.arange(bias.size).reshape(bias.shape)
    operands = [(role, arrays.get(role)) for role in roles]
    add_bias = lambda result, bias: biases.append(tuple(map(np.asarray, bias)))
    role, _ = contraction.follow(traced, operands, multiply, add_bias=add_bias)
    if offset is not None and role != RESULT:
        raise Unsupported("it rearranges its output, behind which a norm adds to it")
    if weight is None:
        if reason := overflow_reason(contraction.contracted_terms(traced)):
            raise Unsupported(reason)
        return MadeLayer(IntegerLayer(inputs=dict(inputs)), INT32, None)
    (kernel, parts), (added, index) = products[0], biases[-1]
    added = added if offset is None else offset
    by_channel = functools.partial(contraction.reduce_channels, kernel)
    weight_scale = by_channel(parts["scale"], _require_equal)
    weight_zero = by_channel(parts["zero_point"], _require_equal)
    codes, steps = parts["codes"].astype(np.int64), inputs["activations"]
    # The bias in steps of the sums, and the bounds of these.
    scale, bias = np.float32(steps.scale) * weight_scale, np.zeros(weight_scale.shape, np.int64)
    if added is not None:
        in_steps = np.round(np.asarray(added, np.float64) / scale)
        bias = in_steps.clip(-(2.0**62), 2.0**62).astype(np.int64)
    most_weight = int(by_channel(abs(codes - parts["zero_point"]), np.sum).max())
    most_bias = int(abs(bias).max(initial=0))
    # The product of the codes as they are is larger than that of the differences; both must fit.
    largest = 255 * most_weight + most_bias
    if largest > INT32:
        raise Unsupported(
            f"its sums reach {largest:.3g}, more than 32 bits hold; its bias is up to "
            f"{abs(bias).max():.3g} of the steps {scale.min():.3g} of its sums"
        )
    reach = max(int(steps.zero_point), int(steps.top) - int(steps.zero_point))
    layer = IntegerLayer(
        inputs=dict(inputs),
        weight=weight,
        weight_scale=jnp.asarray(weight_scale, jnp.float32),
        weight_sum=jnp.asarray(by_channel(codes, np.sum), jnp.int32),
        weight_zero=jnp.asarray(weight_zero, jnp.int32) if weight_zero.any() else None,
        bias=jnp.asarray(bias, jnp.int32) if bias.any() else None,
    )
    rounded = None if added is None else Rounded(bias * np.float64(scale) - added, index)
    return MadeLayer(layer, reach * most_weight + most_bias, rounded)


def overflow_reason(terms: int) -> str:
    """Returns why so many products of two uint8 codes make no int32 sum; "" if they do."""
    largest = 255**2 * terms
    if largest <= INT32:
        return ""
    return f"its sums of {terms} products reach {largest:.3g}, more than 32 bits hold"


def _unpack(weight: QTensor) -> dict[str, np.ndarray]:
    """Returns every array of a weight, of the weight's shape: they are rearranged alike."""
    if weight.levels is not None:
        raise Unsupported("its weight has a number format, not integers")
    zero_point = np.int32(0) if weight.zero_point is None else weight.zero_point
    spread = lambda array: np.broadcast_to(grid.expand(array, weight.shape), weight.shape)
    codes = np.asarray(weight.codes).astype(np.int8)
    return {"codes": codes, "scale": spread(weight.scale), "zero_point": spread(zero_point)}


def _require_equal(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Returns the common value along axes. Raises Unsupported if they differ."""
    if np.ptp(values, axis=axes).any():
        raise Unsupported(
            "its weight has scales in groups along its inputs, which can't share a sum"
        )
    return values.max(axes)
