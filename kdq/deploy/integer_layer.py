"""A layer that multiplies integers, made from a float one and its quantizers."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdq.deploy import arithmetic, contraction
from kdq.deploy.contraction import BIAS, INPUT, OTHER, RESULT, WEIGHT, Kernel
from kdq.deploy.qtensor import InputGrid, QTensor
from kdq.quantize.kinds import Unsupported
from kdq.types import Array

INT32 = 2**31 - 1


class IntegerLayer(flax.struct.PyTreeNode):
    """What an integer layer computes with; of a stack of layers with its axes in front.

    All but `weight` broadcast with the output of the layer's product. No weight is float.
    """

    inputs: dict[str, InputGrid]  # by operand
    weight: QTensor | None = None  # None: a product of two inputs
    weight_scale: Array | None = None  # float32, of the weight
    weight_sum: Array | None = None  # int32, of the weight's codes
    weight_zero: Array | None = None  # int32, of the weight; None is 0
    bias: Array | None = None  # int32, at `scale`

    @property
    def scale(self) -> Array:
        """float32: of the int32 sums."""
        factors = [*[grid.scale for grid in self.inputs.values()], self.weight_scale]
        factors = [factor for factor in factors if factor is not None]
        product = lambda *of: arithmetic.exactly(functools.reduce(operator.mul, of))
        return contraction.at_once(product, *factors)


@dataclasses.dataclass(frozen=True)
class _Find(contraction.Steps):
    """Takes a layer's weight and bias to where they meet its input."""

    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def multiply(self, kernel: Kernel, left: Any, right: Any) -> Any:
        if "kernel" in self.found:
            raise Unsupported("it multiplies more than once")
        self.found.update(kernel=kernel, weight=right)
        return None

    def add_bias(self, result: Any, bias: Any) -> Any:
        self.found["bias"], self.found["index"] = map(np.asarray, bias)
        return result


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What rounding to int32 adds to the bias of a layer."""

    added: np.ndarray  # float64, as it broadcasts with the result of the layer's product
    index: np.ndarray | None  # which element of the layer's own bias each is; None: it has none

    def of_bias(self, shape: tuple[int, ...]) -> np.ndarray:
        """What is added to each element of the layer's own bias."""
        added = np.zeros(shape)
        added.flat[self.index.ravel()] = np.broadcast_to(self.added, self.index.shape).ravel()
        return added


def make(
    traced: core.ClosedJaxpr,
    roles: Sequence[str],
    inputs: Mapping[str, InputGrid],
    weight: QTensor | None,
    bias: np.ndarray | None,
    offset: np.ndarray | None = None,
) -> tuple[IntegerLayer, int, Rounded | None]:
    """One layer, not a stack of them, a bound of its sums, and what became of its bias.

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
    operands = []
    for role in roles:
        if role == WEIGHT:
            operands.append((role, _spread(weight)))
        elif role == BIAS:
            operands.append((role, (np.float32(bias), np.arange(bias.size).reshape(bias.shape))))
        else:
            operands.append((role, None))
    find = _Find()
    role, _ = contraction.follow(traced, operands, find, {INPUT: 0, OTHER: 0})
    found = find.found
    if offset is not None:
        if role != RESULT:
            raise Unsupported("it rearranges its output, behind which a norm adds to it")
        found["bias"] = offset
    if weight is None:
        if reason := why_too_long(contraction.contracted_terms(traced)):
            raise Unsupported(reason)
        return IntegerLayer(inputs=dict(inputs)), INT32, None
    kernel, arrays = found["kernel"], {k: np.asarray(v) for k, v in found["weight"].items()}
    centred = arrays["codes"].astype(np.int64) - arrays["zero_point"]
    of_weight = contraction.of_channels(kernel, arrays["scale"], _same)
    summed = lambda values: contraction.of_channels(kernel, values, np.sum)
    zero = contraction.of_channels(kernel, arrays["zero_point"], _same)
    steps = inputs["activations"]
    of_sums = np.float32(steps.scale) * of_weight
    given = found.get("bias")
    bias = _rounded_bias(given, of_sums)
    reach = max(int(steps.zero_point), int(steps.top) - int(steps.zero_point))
    # The product of the codes as they are is larger than that of the differences; both must fit.
    largest = 255 * int(summed(abs(centred)).max()) + int(abs(bias).max(initial=0))
    if largest > INT32:
        raise Unsupported(
            f"its sums reach {largest:.3g}, more than 32 bits hold; its bias is up to "
            f"{abs(bias).max():.3g} of the steps {of_sums.min():.3g} of its sums"
        )
    largest = reach * int(summed(abs(centred)).max()) + int(abs(bias).max(initial=0))
    layer = IntegerLayer(
        inputs=dict(inputs),
        weight=weight,
        weight_scale=jnp.asarray(of_weight, jnp.float32),
        weight_sum=jnp.asarray(summed(arrays["codes"].astype(np.int64)), jnp.int32),
        weight_zero=jnp.asarray(zero, jnp.int32) if zero.any() else None,
        bias=jnp.asarray(bias, jnp.int32) if bias.any() else None,
    )
    rounded = None
    if given is not None:
        rounded = Rounded(bias * np.float64(of_sums) - given, found.get("index"))
    return layer, largest, rounded


def why_too_long(terms: int) -> str:
    """Returns why so many products of two uint8 codes make no int32 sum; "" if they do."""
    largest = 255**2 * terms
    if largest <= INT32:
        return ""
    return f"its sums of {terms} products reach {largest:.3g}, more than 32 bits hold"


def _rounded_bias(bias: np.ndarray | None, scale: np.ndarray) -> np.ndarray:
    if bias is None:
        return np.zeros(scale.shape, np.int64)
    steps = np.round(np.asarray(bias, np.float64) / scale)
    return steps.clip(-(2.0**62), 2.0**62).astype(np.int64)


def _spread(weight: QTensor) -> dict[str, np.ndarray]:
    """Every array of a weight, of the weight's shape, so that they are rearranged alike."""
    if weight.levels is not None:
        raise Unsupported("its weight has a number format, not integers")
    zero_point = np.int32(0) if weight.zero_point is None else weight.zero_point
    return {
        "codes": np.asarray(weight.codes).astype(np.int8),
        "scale": _expanded(np.asarray(weight.scale), weight.shape),
        "zero_point": _expanded(np.asarray(zero_point), weight.shape),
    }


def _expanded(parameter: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`parameter` for each element of a tensor of that shape; see `kdq.quantize.grid.expand`."""
    for axis in range(-parameter.ndim, 0):
        parameter = np.repeat(parameter, shape[axis] // parameter.shape[axis], axis)
    return np.broadcast_to(parameter, shape)


def _same(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """What the elements of a sum share."""
    if np.ptp(values, axis=axes).any():
        raise Unsupported(
            "its weight has scales in groups along its inputs, which can't share a sum"
        )
    return values.max(axes)
