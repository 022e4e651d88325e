"""The operations on codes in ONNX: converters that jax2onnx calls for `kdq.deploy.primitives`.

Where ONNX Runtime has an integer kernel for a whole layer, the layer is written as
DequantizeLinear, Conv or Gemm, QuantizeLinear, which it fuses into one; anything else as
MatMulInteger, of the windows of a convolution too (its ConvInteger takes four times as long, and is
left for groups of channels). Each computes what `arithmetic` does, bit for bit. Weights are stored
in their own 2, 4 or 8 bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx_ir
from jax.extend import core

from kdq.deploy import contraction, primitives
from kdq.deploy.contraction import Conv, Dot
from kdq.deploy.formats.onnx import program as onnx_program
from kdq.deploy.formats.onnx import windows as onnx_windows
from kdq.deploy.formats.onnx.graph import Graph, convert
from kdq.deploy.formats.onnx.program import NoForm
from kdq.deploy.qtensor import InputGrid


@convert(primitives.quantize_p, "QuantizeLinear")
def _quantize(graph: Graph, eqn: core.JaxprEqn) -> Any:
    grid = graph.known(InputGrid(*eqn.invars[1:]))
    shape = eqn.outvars[0].aval.shape
    return graph.to_codes(graph.value(eqn.invars[0]), grid.scale, grid, shape)


@convert(onnx_program.round_int8_p, "QuantizeLinear")
def _int8_pair(graph: Graph, eqn: core.JaxprEqn) -> Any:
    scale, shape = graph.known(eqn.invars[1]), eqn.outvars[0].aval.shape
    inputs = [graph.value(eqn.invars[0]), graph.constant(scale), graph.constant(np.int8(0))]
    codes = graph.node("QuantizeLinear", inputs, np.int8, shape)
    return graph.from_codes(codes, scale, np.int8(0), shape)


@convert(onnx_program.int8_weight_p, "DequantizeLinear")
def _int8_weight_codes(graph: Graph, eqn: core.JaxprEqn) -> Any:
    codes, scale = graph.known(eqn.invars[0]), graph.known(eqn.invars[1])
    zeros, axis = np.zeros(len(scale), np.int8), eqn.params["axis"]
    return graph.from_codes(graph.constant(codes), scale, zeros, codes.shape, axis=axis)


@convert(primitives.dequantize_p, "DequantizeLinear")
def _dequantize(graph: Graph, eqn: core.JaxprEqn) -> Any:
    grid = graph.known(InputGrid(*eqn.invars[1:]))
    shape = eqn.outvars[0].aval.shape
    return graph.from_codes(
        graph.value(eqn.invars[0]), grid.scale, np.uint8(grid.zero_point), shape
    )


@convert(primitives.to_float_p, "Cast")
def _to_float(graph: Graph, eqn: core.JaxprEqn) -> Any:
    total, scale = eqn.invars
    return _scaled(graph, graph.value(total), graph.value(scale), eqn.outvars[0].aval.shape)


def _scaled(graph: Graph, total: Any, scale: Any, shape: Sequence[Any]) -> Any:
    """int32 sums times a scale."""
    cast = graph.node("Cast", [total], np.float32, shape, to=onnx_ir.DataType.FLOAT.value)
    return graph.node("Mul", [cast, scale], np.float32, shape)


@convert(onnx_program.reshape_p, "Reshape")
def _reshape(graph: Graph, eqn: core.JaxprEqn) -> Any:
    value = graph.value(eqn.invars[0])
    return graph.reshape(value, eqn.params["shape"], eqn.outvars[0].aval.dtype)


@convert(onnx_program.matmul_p, "MatMul")
def _matmul(graph: Graph, eqn: core.JaxprEqn) -> Any:
    out = eqn.outvars[0].aval
    return graph.node("MatMul", [graph.value(atom) for atom in eqn.invars], out.dtype, out.shape)


@convert(onnx_program.add_p, "Add")
def _add(graph: Graph, eqn: core.JaxprEqn) -> Any:
    out = eqn.outvars[0].aval
    return graph.node("Add", [graph.value(atom) for atom in eqn.invars], out.dtype, out.shape)


@convert(onnx_program.slice_p, "Slice")
def _slice(graph: Graph, eqn: core.JaxprEqn) -> Any:
    given, out, params = eqn.invars[0].aval.shape, eqn.outvars[0].aval, eqn.params
    axes = [axis for axis, size in enumerate(given) if isinstance(size, int)]
    steps = params["strides"] or [1] * len(given)
    lists = (params["start_indices"], params["limit_indices"], range(len(given)), steps)
    bounds = [graph.constant(np.int64([of[axis] for axis in axes])) for of in lists]
    return graph.node("Slice", [graph.value(eqn.invars[0]), *bounds], out.dtype, out.shape)


@convert(primitives.weight_p, "DequantizeLinear")
def _weight(graph: Graph, eqn: core.JaxprEqn) -> Any:
    weight = graph.known(jax.tree.unflatten(eqn.params["structure"], eqn.invars))
    codes, shape = weight.codes, weight.codes.shape
    scale, zero = contraction.aligned(weight.scale, len(shape)), weight.zero_point
    along = [axis for axis, size in enumerate(scale.shape) if size > 1]
    groups = [axis for axis in along if scale.shape[axis] != shape[axis]]
    if weight.levels is not None:
        return _of_levels(graph, codes, np.float32(weight.levels), scale)
    if codes.dtype == ml_dtypes.int2 and shape[-1] % 4:
        # ONNX Runtime 1.32 mixes up what shares a byte when it turns rows into columns.
        codes = codes.astype(ml_dtypes.int4)
    at: dict[str, int] = {}
    if groups:
        (axis,) = groups
        sizes = [n if a != axis else scale.shape[a] for a, n in enumerate(shape)]
        at = {"axis": axis, "block_size": shape[axis] // scale.shape[axis]}
    elif len(along) == 1:
        sizes, at = [-1], {"axis": along[0]}
    elif not along:
        sizes = []
    else:
        raise NoForm(f"ONNX has no scale of shape {scale.shape} for a weight of shape {shape}")

    def sized(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array, sizes) if groups else array.reshape(sizes)

    if zero is not None:
        zero = sized(contraction.aligned(zero, len(shape))).astype(codes.dtype)
    elif codes.dtype == np.int8:  # ONNX Runtime's session.x64quantprecision makes one of a scalar
        zero = np.zeros_like(sized(scale), np.int8)
    return graph.from_codes(graph.constant(codes), sized(scale), zero, shape, **at)


def _of_levels(graph: Graph, codes: np.ndarray, levels: np.ndarray, scale: np.ndarray) -> Any:
    """A weight of a number format."""
    shape, to = codes.shape, onnx_ir.DataType.INT32.value
    few = np.asarray(codes).astype(ml_dtypes.uint4 if len(levels) <= 16 else np.uint8)
    index = graph.node("Cast", [graph.constant(few)], np.int32, shape, to=to)
    value = graph.node("Gather", [graph.constant(levels), index], np.float32, shape, axis=0)
    # Each axis as its groups and what is in one.
    sizes = [s for n, of in zip(shape, scale.shape, strict=True) for s in (of, n // of)]
    value = graph.reshape(value, sizes, np.float32)
    scale = graph.constant(scale.reshape([s for of in scale.shape for s in (of, 1)]))
    scaled = graph.node("Mul", [value, scale], np.float32, sizes)
    return graph.reshape(scaled, shape, np.float32)


@convert(primitives.rows_p, "Gather")
def _rows(graph: Graph, eqn: core.JaxprEqn) -> Any:
    indices, *leaves = eqn.invars
    table = graph.known(jax.tree.unflatten(eqn.params["structure"], leaves))
    indices, shape = graph.value(indices), eqn.outvars[0].aval.shape

    def picked(value: Any, array: np.ndarray) -> Any:
        """Rows of what has one for each row of the table."""
        if array.shape[0] == 1:
            return value
        # A scale of a row has one column.
        return graph.node("Gather", [value, indices], array.dtype, [*shape[:-1], array.shape[-1]])

    to_float = {"to": onnx_ir.DataType.FLOAT.value}
    if table.levels is not None:
        index = picked(graph.constant(table.codes.astype(np.int32)), table.codes)
        levels = graph.constant(np.float32(table.levels))
        floats = graph.node("Gather", [levels, index], np.float32, shape, axis=0)
    else:
        codes = picked(graph.weight(table.codes), np.asarray(table.codes).astype(np.int8))
        floats = graph.node("Cast", [codes], np.float32, shape, **to_float)
    if table.zero_point is not None:
        zero = np.float32(table.zero_point)
        floats = graph.node("Sub", [floats, picked(graph.constant(zero), zero)], np.float32, shape)
    scale = np.float32(table.scale)
    return graph.node("Mul", [floats, picked(graph.constant(scale), scale)], np.float32, shape)


@convert(onnx_program.multiply_to_float_p, "Gemm")
def _multiply_floats(graph: Graph, eqn: core.JaxprEqn) -> Any:
    x, w, *leaves, _ = eqn.invars
    parts = graph.known(jax.tree.unflatten(eqn.params["structure"], leaves))
    return _dot(graph, eqn.params["kernel"], x, w, parts, eqn.outvars[0].aval)


@convert(primitives.multiply_p, "QLinearConv")
def _multiply(graph: Graph, eqn: core.JaxprEqn) -> Any:
    x, w, *leaves = eqn.invars
    parts = graph.known(jax.tree.unflatten(eqn.params["structure"], leaves))
    kernel, out = eqn.params["kernel"], eqn.outvars[0].aval
    if isinstance(kernel, Conv):
        return _conv(graph, kernel, graph.value(x), graph.known(w), parts, out)
    return _dot(graph, kernel, x, w, parts, out)


def _finished(graph: Graph, total: Any, parts: dict, out: Any) -> Any:
    """int32 sums without a bias -> what the layer makes."""
    if parts["bias"] is not None:
        total = graph.node("Add", [total, graph.constant(parts["bias"])], np.int32, out.shape)
    grid = parts["grid"]
    if grid is None:
        return total
    multiplier = graph.constant(np.float32(parts["scale"]) / np.float32(grid.scale))
    return graph.to_codes(_scaled(graph, total, multiplier, out.shape), 1, grid, out.shape)


def _product(graph: Graph, multiply: Callable, w: np.ndarray, parts: dict, out: Any) -> Any:
    """`multiply(w)` in the layout of the result, less what the zero points of the weight add."""
    total = multiply(w)
    if parts["w_zero"] is None:
        return total
    sums, zeros = multiply(np.ones_like(w, np.int8)), graph.constant(parts["w_zero"])
    moved = graph.node("Mul", [sums, zeros], np.int32, out.shape)
    return graph.node("Sub", [total, moved], np.int32, out.shape)


def _fused(
    graph: Graph,
    op: str,
    x: Any,
    w: np.ndarray,
    axis: int,
    parts: dict,
    by_channel: Callable[[Any], np.ndarray],
    shape: Sequence[Any],
    **attributes: Any,
) -> Any:
    """A layer from codes to codes, or floats, that ONNX Runtime has one kernel for.

    Args:
      graph: where.
      op: Conv or Gemm.
      x: codes.
      w: codes.
      axis: of the weight, its channels.
      parts: see `primitives.multiply`.
      by_channel: makes a list of what broadcasts with the result.
      shape: of the result.
      **attributes: of `op`.
    """
    of_input, scale = parts["x"], by_channel(parts["w_scale"])
    zeros = lambda dtype: np.zeros(len(scale), dtype)
    floats = [
        graph.from_codes(x, of_input.scale, np.uint8(of_input.zero_point), x.shape),
        graph.from_codes(graph.weight(w), scale, zeros(np.int8), w.shape, axis=axis),
    ]
    if parts["bias"] is not None:
        bias = graph.constant(by_channel(parts["bias"]))
        of_sums = np.float32(of_input.scale) * scale
        floats.append(graph.from_codes(bias, of_sums, None, [len(scale)], axis=0))
    result = graph.node(op, floats, np.float32, shape, **attributes)
    if parts["grid"] is None:
        return result
    return graph.to_codes(result, parts["grid"].scale, parts["grid"], shape)


def _conv(graph: Graph, kernel: Conv, x: Any, w: np.ndarray, parts: dict, out: Any) -> Any:
    numbers = kernel.dimension_numbers
    w = np.transpose(w, numbers.rhs_spec)
    fused = parts["grid"] is not None and parts["w_zero"] is None
    if not fused and kernel.groups == 1:
        return _windows_product(graph, kernel, x, w, parts, out)
    x = graph.transpose(x, numbers.lhs_spec, np.uint8)
    x, padding = _stuffed(graph, kernel, x, 2, parts["x"].zero_point)
    shape = [out.shape[axis] for axis in numbers.out_spec]
    attributes = {
        "pads": [low for low, _ in padding] + [high for _, high in padding],
        "strides": list(kernel.strides),
        "dilations": list(kernel.kernel_dilation),
        "group": kernel.groups,
        "kernel_shape": list(w.shape[2:]),
    }
    back = np.argsort(numbers.out_spec)
    if fused:

        def by_channel(array: Any) -> np.ndarray:
            array = contraction.aligned(array, len(shape)).transpose(numbers.out_spec)
            return np.broadcast_to(array, [1, len(w), *[1] * (len(shape) - 2)]).ravel()

        codes = _fused(graph, "Conv", x, w, 0, parts, by_channel, shape, **attributes)
        return graph.transpose(codes, back, np.uint8)
    zero = graph.constant(np.uint8(parts["x"].zero_point))

    def multiply(w: np.ndarray) -> Any:
        factors = [x, graph.weight(w), zero]
        total = graph.node("ConvInteger", factors, np.int32, shape, **attributes)
        return graph.transpose(total, back, np.int32)

    return _finished(graph, _product(graph, multiply, w, parts, out), parts, out)


def _windows_product(
    graph: Graph, kernel: Conv, x: Any, w: np.ndarray, parts: dict, out: Any
) -> Any:
    """A convolution as a product of matrices; `w` is [output channels, input channels, ...]."""
    numbers = kernel.dimension_numbers
    channels_last = lambda spec: [spec[0], *spec[2:], spec[1]]
    x = graph.transpose(x, channels_last(numbers.lhs_spec), np.uint8)
    x, padding = _stuffed(graph, kernel, x, 1, parts["x"].zero_point)
    x = _padded(graph, x, padding, parts["x"].zero_point)
    order = channels_last(numbers.out_spec)
    shape, size = [out.shape[axis] for axis in order], w.shape[2:]
    axes = graph.constant(np.arange(1, len(size) + 1))
    steps = graph.constant(np.int64(kernel.strides))
    reach = np.multiply(np.subtract(shape[1:-1], 1), kernel.strides) + 1
    taken = []
    for tap in np.ndindex(*size):
        start = np.multiply(tap, kernel.kernel_dilation)
        bounds = [graph.constant(np.int64(start)), graph.constant(np.int64(start + reach))]
        at = [*shape[:-1], w.shape[1]]
        taken.append(graph.node("Slice", [x, *bounds, axes, steps], np.uint8, at))
    terms = w.shape[1] * len(taken)
    windows = graph.node("Concat", taken, np.uint8, [*shape[:-1], terms], axis=len(shape) - 1)
    zero = graph.constant(np.uint8(parts["x"].zero_point))

    def multiply(w: np.ndarray) -> Any:
        matrix = np.moveaxis(w, (0, 1), (-1, -2)).reshape(terms, -1)
        factors = [windows, graph.weight(matrix), zero]
        total = graph.node("MatMulInteger", factors, np.int32, shape)
        return graph.transpose(total, np.argsort(order), np.int32)

    return _finished(graph, _product(graph, multiply, w, parts, out), parts, out)


def _padded(graph: Graph, x: Any, padding: Sequence[tuple[int, int]], zero: Any) -> Any:
    """N...C codes with their zero point around them."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return onnx_windows.pad(graph, x, x.shape, config, graph.constant(np.uint8(zero)), np.uint8)[0]


def _stuffed(
    graph: Graph, kernel: Conv, x: Any, first: int, zero: Any
) -> tuple[Any, Sequence[tuple[int, int]]]:
    """Codes with the zeros of a transposed convolution between them, and the padding left.

    `first` is the first axis of those that are convolved.
    """
    if set(kernel.input_dilation) == {1} and min(min(pair) for pair in kernel.padding) >= 0:
        return x, kernel.padding
    config = [(0, 0, 0)] * len(x.shape)
    for axis, (step, pair) in enumerate(
        zip(kernel.input_dilation, kernel.padding, strict=True), first
    ):
        config[axis] = (*pair, step - 1)
    fill = graph.constant(np.uint8(zero))
    x, _ = onnx_windows.pad(graph, x, x.shape, config, fill, np.uint8)
    return x, [(0, 0)] * len(kernel.padding)


def _dot(graph: Graph, kernel: Dot, x_atom: Any, w_atom: Any, parts: dict, out: Any) -> Any:
    axes = contraction.axes(kernel, len(w_atom.aval.shape))
    sizes = lambda atom, of: [atom.aval.shape[axis] for axis in of]
    parallel, terms = sizes(x_atom, axes.x_shared), math.prod(sizes(x_atom, axes.x_summed))
    rows, columns = sizes(x_atom, axes.x_free), sizes(w_atom, axes.w_free)
    height, width = math.prod(rows), math.prod(columns)

    def matrices(value: Any, order: Sequence[int], shape: Sequence[Any], split: int) -> Any:
        """Codes with one axis of rows and one of columns; `split` is where these begin."""
        value = graph.transpose(value, order, np.uint8)
        if len(order) == len(parallel) + 2 and split == len(parallel) + 1:
            return value
        return graph.reshape(value, [*parallel, *shape], np.uint8)

    def laid_out(value: Any, dtype: Any) -> Any:
        """A product of matrices in the layout of the result."""
        if len(rows) != 1 or len(columns) != 1:
            value = graph.reshape(value, [*parallel, *rows, *columns], dtype)
        return graph.transpose(value, axes.order, dtype)

    order = [*axes.x_shared, *axes.x_free, *axes.x_summed]
    x = matrices(graph.value(x_atom), order, [height, terms], len(parallel) + len(rows))
    x_zero = graph.constant(np.uint8(parts["x"].zero_point))
    order = [*axes.w_shared, *axes.w_summed, *axes.w_free]
    if parts["other"] is not None:
        split = len(parallel) + len(axes.w_summed)
        w = matrices(graph.value(w_atom), order, [terms, width], split)
        factors = [x, w, x_zero, graph.constant(np.uint8(parts["other"].zero_point))]
        total = graph.node("MatMulInteger", factors, np.int32, [*parallel, height, width])
        return _finished(graph, laid_out(total, np.int32), parts, out)
    w = graph.known(w_atom)
    w = np.transpose(w, order).reshape(*sizes(w_atom, axes.w_shared), terms, width)
    to_float = out.dtype == jnp.float32
    if to_float or (parts["grid"] is not None and parts["w_zero"] is None and not parallel):

        def by_channel(array: Any) -> np.ndarray:
            array = contraction.aligned(array, len(axes.order)).transpose(axes.back)
            return np.broadcast_to(array, [1] * len(rows) + columns).ravel()

        found = _fused(graph, "Gemm", x, w, 1, parts, by_channel, [height, width])
        return laid_out(found, np.float32 if to_float else np.uint8)

    def multiply(w: np.ndarray) -> Any:
        factors = [x, graph.weight(w), x_zero]
        total = graph.node("MatMulInteger", factors, np.int32, [*parallel, height, width])
        return laid_out(total, np.int32)

    return _finished(graph, _product(graph, multiply, w, parts, out), parts, out)
