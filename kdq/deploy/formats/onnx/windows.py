"""Windows and padding in ONNX, over any axes of any number: pools of floats and of codes.

ONNX Runtime pools the last one to three axes of an array that has two before them, and knows maxima
of float32 and 8 bits, and means of float32. What fits is brought into that form; anything else is
the elements of the window, one after the other.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx_ir
from jax.extend import core

from kdq.deploy.formats.onnx import program as onnx_program
from kdq.deploy.formats.onnx.graph import Graph, convert
from kdq.deploy.formats.onnx.program import NoForm

MOST_AXES = 3  # that ONNX Runtime pools over
POOLED = {"max": (np.float32, np.int8, np.uint8), "min": (np.float32, np.int8, np.uint8)}
POOLED["add"] = (np.float32,)
STEPS = {"max": "Max", "min": "Min", "add": "Add", "mul": "Mul"}
# What ONNX Runtime's kernels compute other types in.
WIDER = {"float16": np.float32, "bfloat16": np.float32, "bool": np.uint8, "uint16": np.int32}
WIDER |= dict.fromkeys(("int2", "int4", "int8", "int16", "uint2", "uint4", "uint8"), np.int32)


def cast(graph: Graph, value: Any, shape: Sequence[Any], dtype: Any) -> Any:
    """An array of another type."""
    to = onnx_ir.DataType.from_numpy(np.dtype(dtype)).value
    return graph.node("Cast", [value], dtype, shape, to=to)


def pad(
    graph: Graph,
    value: Any,
    shape: Sequence[Any],
    config: Sequence[tuple[int, int, int]],
    fill: Any,
    dtype: Any,
) -> tuple[Any, list[Any]]:
    """An array with more around and between its elements, or less around; and its shape.

    Args:
      graph: where.
      value: the array.
      shape: its shape.
      config: `(low, high, interior)` for each axis, as `jax.lax.pad` takes them.
      fill: the value of a scalar.
      dtype: of both; one that ONNX Runtime pads.
    """
    shape = list(shape)
    ends = np.int64([(low, high) for low, high, _ in config]).T

    def around(value: Any, ends: np.ndarray, shape: Sequence[Any]) -> Any:
        if not ends.any():
            return value
        return graph.node("Pad", [value, graph.constant(ends.ravel()), fill], dtype, shape)

    for axis, (_, _, interior) in enumerate(config):
        if not interior:
            continue
        # Each element with what is put behind it; what stands behind the last is cut off again.
        before, size, after = shape[:axis], shape[axis], shape[axis + 1 :]
        if not isinstance(size, int):
            raise NoForm("nothing can be put between the examples of a batch of any size")
        value = graph.reshape(value, [*before, size, 1, *after], dtype)
        behind = np.zeros((2, len(shape) + 1), np.int64)
        behind[1, axis + 1] = interior
        value = around(value, behind, [*before, size, interior + 1, *after])
        shape[axis] = size * (interior + 1)
        value = graph.reshape(value, shape, dtype)
        ends[1, axis] -= interior
    grown = [int(low + high) for low, high in ends.T]
    shape = [n + more if more else n for n, more in zip(shape, grown, strict=True)]
    return around(value, ends, shape), shape


@convert(onnx_program.pad_p, "Pad")
def _pad(graph: Graph, eqn: core.JaxprEqn) -> Any:
    operand, fill = eqn.invars
    aval, dtype = operand.aval, operand.aval.dtype
    value, fill, wide = graph.value(operand), graph.value(fill), WIDER.get(dtype.name)
    if wide is not None and dtype.name not in ("int8", "uint8", "float16"):
        value, fill = cast(graph, value, aval.shape, wide), cast(graph, fill, (), wide)
    else:
        wide = None
    padded, shape = pad(graph, value, aval.shape, eqn.params["padding_config"], fill, wide or dtype)
    return padded if wide is None else cast(graph, padded, shape, dtype)


@convert(onnx_program.window_p, "MaxPool")
def _window(graph: Graph, eqn: core.JaxprEqn) -> Any:
    params, aval = eqn.params, eqn.invars[0].aval
    reducer, dtype, shape = params["reducer"], np.dtype(aval.dtype), list(aval.shape)
    value, init, out = graph.value(eqn.invars[0]), graph.known(eqn.invars[1]), eqn.outvars[0].aval
    pooled = dtype.type in POOLED.get(reducer, ()) and _is_identity(reducer, init, dtype)
    wide = dtype if pooled else np.dtype(WIDER.get(dtype.name, dtype))
    if wide != dtype:
        value = cast(graph, value, shape, wide)
        pooled = wide.type in POOLED.get(reducer, ()) and _is_identity(reducer, init, dtype)
    windows = _Windows.from_params(params)
    axes = windows.axes
    # A pool pads by itself, if by less than a window: with what never is its result.
    inside = [
        interior == 0 and max(low, high) < size and min(low, high) >= 0
        for (low, high, interior), size in zip(windows.padding, windows.sizes, strict=True)
    ]
    unknown = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(axes) > MOST_AXES or len(unknown) > 1 or not {*axes}.isdisjoint(unknown):
        pooled = False
    if not pooled or not all(inside):
        fill = graph.constant(np.asarray(init).astype(wide))
        value, shape = pad(graph, value, shape, windows.padding, fill, wide)
        windows = windows.without_padding()
    write = _pool if pooled else _taps
    value = write(graph, reducer, value, shape, windows, list(out.shape), wide)
    if not pooled and not _is_identity(reducer, init, dtype):
        init = graph.constant(np.asarray(init).astype(wide))
        value = graph.node(STEPS[reducer], [value, init], wide, out.shape)
    return value if wide == dtype else cast(graph, value, out.shape, dtype)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Windows over the axes of an array: a number, or what pads it, for each axis."""

    sizes: Sequence[int]
    strides: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[tuple[int, int, int]]  # low, high, between elements

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> "_Windows":
        """Returns those of a primitive of JAX."""
        padding = zip(params["padding"], params["base_dilation"], strict=True)
        padding = [(low, high, step - 1) for (low, high), step in padding]
        sizes, strides = params["window_dimensions"], params["window_strides"]
        return cls(tuple(sizes), tuple(strides), tuple(params["window_dilation"]), padding)

    def without_padding(self) -> "_Windows":
        return dataclasses.replace(self, padding=[(0, 0, 0)] * len(self.sizes))

    @property
    def axes(self) -> list[int]:
        """On which anything happens."""
        of_axes = zip(self.sizes, self.strides, self.padding, strict=True)
        return [axis for axis, of in enumerate(of_axes) if of != (1, 1, (0, 0, 0))]


def _is_identity(reducer: str, init: Any, dtype: np.dtype) -> bool:
    """Returns whether a reduction that starts with it is that of the elements alone."""
    init = np.asarray(init)
    if reducer in ("add", "mul"):
        return bool(init == (0 if reducer == "add" else 1))
    limits = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype)
    limit = limits.min if reducer == "max" else limits.max
    return bool(init <= limit if reducer == "max" else init >= limit)


def _pool(
    graph: Graph,
    reducer: str,
    value: Any,
    shape: Sequence[Any],
    windows: _Windows,
    out_shape: list[Any],
    dtype: np.dtype,
) -> Any:
    """One node of ONNX's pools, between what arranges its axes."""
    axes = windows.axes
    if not axes:
        return value
    others = [axis for axis in range(len(shape)) if axis not in axes]
    # Two axes come first: that of the batch, or all that are of no known size, and all others.
    unknown = [shape[axis] for axis in others if not isinstance(shape[axis], int)]
    known = [shape[axis] for axis in others if isinstance(shape[axis], int)]
    order = [axis for axis in others if not isinstance(shape[axis], int)]
    order += [axis for axis in others if isinstance(shape[axis], int)] + axes
    leading = [*(unknown or [1]), math.prod(known)]
    value = graph.transpose(value, order, dtype)
    if [*unknown, *known] != leading:
        value = graph.reshape(value, [*leading, *(shape[axis] for axis in axes)], dtype)
    pooled = [*leading, *(out_shape[axis] for axis in axes)]
    before = [*leading, *(shape[axis] for axis in axes)]
    chosen = lambda of: [int(of[axis]) for axis in axes]
    attributes = {
        "kernel_shape": chosen(windows.sizes),
        "strides": chosen(windows.strides),
        "dilations": chosen(windows.dilation),
        "pads": [windows.padding[axis][end] for end in (0, 1) for axis in axes],
    }
    if reducer == "add":  # the mean, of what is padded too, times how many there are
        value = graph.node("AveragePool", [value], dtype, pooled, count_include_pad=1, **attributes)
        count = graph.constant(np.asarray(math.prod(windows.sizes), dtype))
        value = graph.node("Mul", [value, count], dtype, pooled)
    else:
        turned = "Neg" if dtype == np.float32 else "BitwiseNot"  # either turns the order around
        if reducer == "min":
            value = graph.node(turned, [value], dtype, before)
        value = graph.node("MaxPool", [value], dtype, pooled, **attributes)
        if reducer == "min":
            value = graph.node(turned, [value], dtype, pooled)
    arranged = [out_shape[axis] for axis in order]
    if arranged != pooled:
        value = graph.reshape(value, arranged, dtype)
    return graph.transpose(value, list(np.argsort(order)), dtype)


def _taps(
    graph: Graph,
    reducer: str,
    value: Any,
    shape: Sequence[Any],
    windows: _Windows,
    out_shape: list[Any],
    dtype: np.dtype,
) -> Any:
    """Each element of the window as an array, reduced one after the other."""
    axes = windows.axes
    if not axes:
        return value
    if not all(isinstance(shape[axis], int) for axis in axes):
        raise NoForm("it has a window over the examples of a batch of any size")
    at = graph.constant(np.int64(axes))
    chosen = lambda of: np.int64([of[axis] for axis in axes])
    steps, dilation = chosen(windows.strides), chosen(windows.dilation)
    reach = (chosen(out_shape) - 1) * steps + 1
    taken = []
    for tap in np.ndindex(*chosen(windows.sizes)):
        start = np.multiply(tap, dilation)
        bounds = [graph.constant(start), graph.constant(start + reach), at, graph.constant(steps)]
        taken.append(graph.node("Slice", [value, *bounds], dtype, out_shape))
    join = lambda a, b: graph.node(STEPS[reducer], [a, b], dtype, out_shape)
    return functools.reduce(join, taken)
