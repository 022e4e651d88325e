"""Windows and padding in ONNX, over any axes of any number: pools of floats and of codes.

ONNX Runtime pools the last one to three axes of an array that has two before them, and knows maxima
of float32 and 8 bits, and means of float32. What fits is brought into that form; anything else is
the elements of the window, one after the other.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdq.deploy.formats.onnx import program as onnx_program
from kdq.deploy.formats.onnx.nodes import Graph, register
from kdq.deploy.formats.onnx.program import NoForm

MOST_AXES = 3  # that ONNX Runtime pools over
POOLED = {"max": (np.float32, np.int8, np.uint8), "min": (np.float32, np.int8, np.uint8)}
POOLED["add"] = (np.float32,)
STEPS = {"max": "Max", "min": "Min", "add": "Add", "mul": "Mul"}
# What ONNX Runtime's kernels compute other types in.
WIDER = {"float16": np.float32, "bfloat16": np.float32, "bool": np.uint8, "uint16": np.int32}
WIDER |= dict.fromkeys(("int2", "int4", "int8", "int16", "uint2", "uint4", "uint8"), np.int32)


def pad(
    graph: Graph,
    value: Any,
    shape: Sequence[Any],
    config: Sequence[tuple[int, int, int]],
    fill: Any,
    dtype: Any,
) -> tuple[Any, list[Any]]:
    """Writes an array with more around and between its elements, or less around; and its shape.

    `config` is as `jax.lax.pad` takes it; ONNX Runtime must pad the type.
    """
    shape = list(shape)
    ends = np.int64([(low, high) for low, high, _ in config]).T

    def around(value: Any, ends: np.ndarray, shape: Sequence[Any]) -> Any:
        return graph.node("Pad", [value, ends.ravel(), fill], dtype, shape) if ends.any() else value

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


@register(onnx_program.pad_p)
def _pad(graph: Graph, out: Any, x: core.Var, fill: core.Var, *, padding_config: Any) -> Any:
    value, fill, dtype, shape = graph.value(x), graph.value(fill), out.dtype, x.aval.shape
    wide = WIDER.get(dtype.name)
    if wide is None or dtype.name in ("int8", "uint8", "float16"):
        return pad(graph, value, shape, padding_config, fill, dtype)[0]
    value, fill = graph.cast(value, shape, wide), graph.cast(fill, (), wide)
    padded, shape = pad(graph, value, shape, padding_config, fill, wide)
    return graph.cast(padded, shape, dtype)


class _Windows(NamedTuple):
    """A reduction of windows over the axes of an array."""

    reducer: str  # a key of STEPS
    shape: Sequence[Any]  # of the array
    out_shape: Sequence[Any]
    sizes: Sequence[int]  # for each axis, as are the next
    strides: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[tuple[int, int, int]]  # low, high, between elements

    @property
    def axes(self) -> list[int]:
        """The axes on which anything happens."""
        changes = zip(self.sizes, self.strides, self.padding, strict=True)
        return [axis for axis, change in enumerate(changes) if change != (1, 1, (0, 0, 0))]

    def chosen(self, numbers: Sequence[int]) -> list[int]:
        """Returns the numbers of the axes on which anything happens."""
        return [int(numbers[axis]) for axis in self.axes]


@register(onnx_program.window_p)
def _window(
    graph: Graph, out: Any, x: core.Var, init: core.Var, *, reducer: str, **params: Any
) -> Any:
    edges = zip(params["padding"], params["base_dilation"], strict=True)
    windows = _Windows(
        reducer,
        list(x.aval.shape),
        list(out.shape),
        tuple(params["window_dimensions"]),
        tuple(params["window_strides"]),
        tuple(params["window_dilation"]),
        [(low, high, step - 1) for (low, high), step in edges],
    )
    value, init = graph.value(x), graph.known(init)
    dtype = wide = np.dtype(out.dtype)
    is_identity = _is_identity(reducer, init, dtype)
    if dtype.type not in POOLED.get(reducer, ()) or not is_identity:
        wide = np.dtype(WIDER.get(dtype.name, dtype))
    if wide != dtype:
        value = graph.cast(value, windows.shape, wide)
    # A pool takes one axis of no known size, over which it does not reduce.
    unknown = [axis for axis, size in enumerate(windows.shape) if not isinstance(size, int)]
    few = len(windows.axes) <= MOST_AXES and len(unknown) <= 1
    pools = wide.type in POOLED.get(reducer, ()) and is_identity
    pools = pools and few and {*windows.axes}.isdisjoint(unknown)
    # It pads by less than a window, with what never is its result.
    pads = all(
        interior == 0 and max(low, high) < size and min(low, high) >= 0
        for (low, high, interior), size in zip(windows.padding, windows.sizes, strict=True)
    )
    if not (pools and pads):
        start = graph.constant(np.asarray(init).astype(wide))
        value, shape = pad(graph, value, windows.shape, windows.padding, start, wide)
        windows = windows._replace(shape=shape, padding=[(0, 0, 0)] * len(shape))
    if windows.axes:  # else nothing but padding happens
        value = (_pool if pools else _reduce_taps)(graph, windows, value, wide)
    if not pools and not is_identity:
        start = np.asarray(init).astype(wide)
        value = graph.node(STEPS[reducer], [value, start], wide, windows.out_shape)
    return value if wide == dtype else graph.cast(value, windows.out_shape, dtype)


def _is_identity(reducer: str, init: Any, dtype: np.dtype) -> bool:
    """Returns whether a reduction that starts with `init` is that of the elements alone."""
    init = np.asarray(init)
    if reducer in ("add", "mul"):
        return bool(init == (0 if reducer == "add" else 1))
    limits = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype)
    limit = limits.min if reducer == "max" else limits.max
    return bool(init <= limit if reducer == "max" else init >= limit)


def _pool(graph: Graph, windows: _Windows, value: Any, dtype: np.dtype) -> Any:
    """Writes one node of ONNX's pools, between what arranges its axes."""
    axes, shape, chosen = windows.axes, windows.shape, windows.chosen
    others = [axis for axis in range(len(shape)) if axis not in axes]
    # Two axes come first: that of the batch, or all that are of no known size, and all others.
    unknown = [axis for axis in others if not isinstance(shape[axis], int)]
    known = [axis for axis in others if isinstance(shape[axis], int)]
    order = [*unknown, *known, *axes]
    sizes = [shape[axis] for axis in order[: len(others)]]
    leading = [*([shape[axis] for axis in unknown] or [1]), math.prod(shape[a] for a in known)]
    value = graph.transpose(value, order, dtype)
    before = [*leading, *(shape[axis] for axis in axes)]
    if sizes != leading:
        value = graph.reshape(value, before, dtype)
    pooled = [*leading, *(windows.out_shape[axis] for axis in axes)]
    attributes = {
        "kernel_shape": chosen(windows.sizes),
        "strides": chosen(windows.strides),
        "dilations": chosen(windows.dilation),
        "pads": [windows.padding[axis][end] for end in (0, 1) for axis in axes],
    }
    if windows.reducer == "add":  # the mean, of what is padded too, times how many there are
        value = graph.node("AveragePool", [value], dtype, pooled, count_include_pad=1, **attributes)
        count = np.asarray(math.prod(windows.sizes), dtype)
        value = graph.node("Mul", [value, count], dtype, pooled)
    else:
        turned = "Neg" if dtype == np.float32 else "BitwiseNot"  # either turns the order around
        if windows.reducer == "min":
            value = graph.node(turned, [value], dtype, before)
        value = graph.node("MaxPool", [value], dtype, pooled, **attributes)
        if windows.reducer == "min":
            value = graph.node(turned, [value], dtype, pooled)
    arranged = [windows.out_shape[axis] for axis in order]
    if arranged != pooled:
        value = graph.reshape(value, arranged, dtype)
    return graph.transpose(value, np.argsort(order), dtype)


def _reduce_taps(graph: Graph, windows: _Windows, value: Any, dtype: np.dtype) -> Any:
    """Writes each element of the window as an array, and reduces one after the other."""
    axes, out_shape, chosen = windows.axes, windows.out_shape, windows.chosen
    if not all(isinstance(windows.shape[axis], int) for axis in axes):
        raise NoForm("it has a window over the examples of a batch of any size")
    window = (chosen(windows.sizes), chosen(windows.strides), chosen(windows.dilation))
    taps = slice_taps(graph, value, axes, window, out_shape, dtype)
    join = lambda a, b: graph.node(STEPS[windows.reducer], [a, b], dtype, out_shape)
    return functools.reduce(join, taps)


def slice_taps(
    graph: Graph, value: Any, axes: Sequence[int], window: tuple, shape: Sequence[Any], dtype: Any
) -> list[Any]:
    """Writes each element of windows over some axes, in an array of a shape.

    `window` has the sizes, strides and dilation, one for each of the axes.
    """
    sizes, strides, dilation = map(np.int64, window)
    reach = (np.int64([shape[axis] for axis in axes]) - 1) * strides + 1
    taps = []
    for tap in np.ndindex(*sizes):
        start = tap * dilation
        bounds = [start, start + reach, np.int64(axes), strides]
        taps.append(graph.node("Slice", [value, *bounds], dtype, shape))
    return taps
