"""Products in ONNX: converters that jax2onnx calls for `kdq.deploy.primitives.product`.

Where ONNX Runtime has an integer kernel for a whole layer, the layer is written as
DequantizeLinear, Conv or Gemm, QuantizeLinear, which it fuses into one; anything else as
MatMulInteger, of the windows of a convolution too (its ConvInteger takes four times as long, and is
left for groups of channels). Each computes what `arithmetic` does, bit for bit. Weights are stored
in their own 2, 4 or 8 bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdq.deploy import contraction, primitives
from kdq.deploy.contraction import Conv, Dot
from kdq.deploy.formats.onnx import program as onnx_program
from kdq.deploy.formats.onnx.nodes import Graph, register
from kdq.deploy.formats.onnx.windows import pad, slice_taps
from kdq.deploy.integer_layer import IntegerLayer


@register(onnx_program.conv_p)
def _float_conv(graph: Graph, out: Any, x: core.Var, w: core.Var, **params: Any) -> Any:
    """Writes a convolution of floats over any number of axes, of any layout."""
    kernel, dtype = contraction.conv(params), np.dtype(out.dtype)
    numbers = kernel.dimension_numbers
    arrange = lambda atom, spec: graph.transpose(graph.value(atom), spec, dtype)
    # What is between the elements of the input, or cut off around them, has an operator of its own.
    config = [(min(low, 0), min(high, 0), between) for low, high, between in _edges(kernel)]
    shape, config = [x.aval.shape[a] for a in numbers.lhs_spec], [(0, 0, 0)] * 2 + config
    value = arrange(x, numbers.lhs_spec)
    value, _ = pad(graph, value, shape, config, np.zeros((), dtype), dtype)
    around = [(max(low, 0), max(high, 0)) for low, high in kernel.padding]
    attributes = _attributes(kernel, around, [w.aval.shape[a] for a in numbers.rhs_spec[2:]])
    factors, shape = [value, arrange(w, numbers.rhs_spec)], [out.shape[a] for a in numbers.out_spec]
    result = graph.node("Conv", factors, dtype, shape, **attributes)
    return graph.transpose(result, np.argsort(numbers.out_spec), dtype)


def _attributes(
    kernel: Conv, padding: Sequence[tuple[int, int]], sizes: Sequence[int]
) -> dict[str, Any]:
    """Returns what ONNX's convolutions are told beside their arrays."""
    return {
        "pads": [low for low, _ in padding] + [high for _, high in padding],
        "strides": list(kernel.strides),
        "dilations": list(kernel.kernel_dilation),
        "group": kernel.groups,
        "kernel_shape": list(sizes),
    }


@register(onnx_program.product_to_float.primitive, primitives.product.primitive)
def _product(graph: Graph, out: Any, x: core.Var, w: core.Var, *more: Any, **params: Any) -> Any:
    layer, kernel = graph.known(more[0]), params["kernel"]
    if isinstance(kernel, Conv):
        return _conv(graph, kernel, graph.value(x), graph.known(w), layer, out)
    return _dot(graph, kernel, x, w, layer, out)


def _multiply(
    graph: Graph, multiply: Callable[[Any], Any], w: Any, layer: IntegerLayer, out: Any
) -> Any:
    """Writes a layer of int32 sums, `multiply(w)` in the layout of the result: less what the
    weight's zeros add, with its bias, and as the codes of its output."""
    total = multiply(w)
    if layer.weight_zero is not None:
        sums = multiply(np.ones_like(w, np.int8))
        moved = graph.node("Mul", [sums, layer.weight_zero], np.int32, out.shape)
        total = graph.node("Sub", [total, moved], np.int32, out.shape)
    if layer.bias is not None:
        total = graph.node("Add", [total, layer.bias], np.int32, out.shape)
    if layer.output is None:
        return total
    multiplier = np.float32(layer.scale) / np.float32(layer.output.scale)
    steps = graph.scaled(total, multiplier, out.shape)
    return graph.to_codes(steps, layer.output, out.shape, scale=1)


def _fuse(
    graph: Graph,
    op: str,
    x: Any,
    w: np.ndarray,
    layer: IntegerLayer,
    by_channel: Callable[[Any], np.ndarray],
    shape: Sequence[Any],
    **attributes: Any,
) -> Any:
    """Writes a layer from codes to codes, or floats, that ONNX Runtime has one kernel for.

    `w` is [channels, ...] for Conv, [terms, channels] for Gemm; `by_channel` makes a list of what
    broadcasts with the result.
    """
    scale, axis = by_channel(layer.weight_scale), {"Conv": 0, "Gemm": 1}[op]
    zeros = np.zeros(len(scale), np.int8)
    steps = layer.inputs["activations"]
    floats = [
        graph.from_codes(x, steps.scale, np.uint8(steps.zero_point), x.shape),
        graph.from_codes(graph.weight(w), scale, zeros, w.shape, axis=axis),
    ]
    if layer.bias is not None:
        bias, sum_scale = by_channel(layer.bias), np.float32(steps.scale) * scale
        floats.append(graph.from_codes(bias, sum_scale, None, [len(scale)], axis=0))
    result = graph.node(op, floats, np.float32, shape, **attributes)
    return result if layer.output is None else graph.to_codes(result, layer.output, shape)


def _conv(graph: Graph, kernel: Conv, x: Any, w: np.ndarray, layer: IntegerLayer, out: Any) -> Any:
    numbers = kernel.dimension_numbers
    w = np.transpose(w, numbers.rhs_spec)  # [output channels, input channels, *window]
    fused = layer.output is not None and layer.weight_zero is None
    if not fused and kernel.groups == 1:
        return _conv_by_matmul(graph, kernel, x, w, layer, out)
    x = graph.transpose(x, numbers.lhs_spec, np.uint8)  # [examples, channels, ...]
    zero, padding = np.uint8(layer.inputs["activations"].zero_point), kernel.padding
    if set(kernel.input_dilation) != {1} or min(min(pair) for pair in padding) < 0:
        x, _ = pad(graph, x, x.shape, [(0, 0, 0)] * 2 + _edges(kernel), zero, np.uint8)
        padding = [(0, 0)] * len(padding)
    shape = [out.shape[axis] for axis in numbers.out_spec]
    attributes = _attributes(kernel, padding, w.shape[2:])
    back = np.argsort(numbers.out_spec)
    if fused:

        def by_channel(array: Any) -> np.ndarray:
            array = contraction.align(array, len(shape)).transpose(numbers.out_spec)
            return np.broadcast_to(array, [1, len(w), *[1] * (len(shape) - 2)]).ravel()

        codes = _fuse(graph, "Conv", x, w, layer, by_channel, shape, **attributes)
        return graph.transpose(codes, back, np.uint8)

    def multiply(w: np.ndarray) -> Any:
        factors = [x, graph.weight(w), zero]
        total = graph.node("ConvInteger", factors, np.int32, shape, **attributes)
        return graph.transpose(total, back, np.int32)

    return _multiply(graph, multiply, w, layer, out)


def _conv_by_matmul(
    graph: Graph, kernel: Conv, x: Any, w: np.ndarray, layer: IntegerLayer, out: Any
) -> Any:
    """Writes a convolution as a product of matrices; `w`: [output channels, input channels, ...].

    A row of the left matrix is all that a window meets, an element of the window after the other.
    """
    numbers, zero = kernel.dimension_numbers, np.uint8(layer.inputs["activations"].zero_point)
    channels_last = lambda spec: [spec[0], *spec[2:], spec[1]]
    x = graph.transpose(x, channels_last(numbers.lhs_spec), np.uint8)  # [examples, ..., channels]
    config = [(0, 0, 0), *_edges(kernel), (0, 0, 0)]
    x, _ = pad(graph, x, x.shape, config, zero, np.uint8)
    order = channels_last(numbers.out_spec)
    shape, size = [out.shape[axis] for axis in order], w.shape[2:]
    axes, window = range(1, len(size) + 1), (size, kernel.strides, kernel.kernel_dilation)
    taps = slice_taps(graph, x, axes, window, [*shape[:-1], w.shape[1]], np.uint8)
    terms = w.shape[1] * len(taps)
    windows = graph.node("Concat", taps, np.uint8, [*shape[:-1], terms], axis=len(shape) - 1)

    def multiply(w: np.ndarray) -> Any:
        # [*window, input channels, output channels] -> [terms, output channels]
        matrix = np.moveaxis(w, (0, 1), (-1, -2)).reshape(terms, -1)
        factors = [windows, graph.weight(matrix), zero]
        total = graph.node("MatMulInteger", factors, np.int32, shape)
        return graph.transpose(total, np.argsort(order), np.int32)

    return _multiply(graph, multiply, w, layer, out)


def _edges(kernel: Conv) -> list[tuple[int, int, int]]:
    """Returns what a convolution puts around the elements of its input, and between them."""
    edges = zip(kernel.padding, kernel.input_dilation, strict=True)
    return [(low, high, step - 1) for (low, high), step in edges]


def _dot(graph: Graph, kernel: Dot, x_atom: Any, w_atom: Any, layer: IntegerLayer, out: Any) -> Any:
    """Writes a product of the input [*shared, height, terms] and a weight [*shared, terms, width].

    Both are brought into that form, and the result into the layout that the layer has.
    """
    axes = contraction.list_axes(kernel, len(w_atom.aval.shape))
    sizes = lambda atom, axes: [atom.aval.shape[axis] for axis in axes]
    shared, terms = sizes(x_atom, axes.x_shared), math.prod(sizes(x_atom, axes.x_summed))
    rows, columns = sizes(x_atom, axes.x_free), sizes(w_atom, axes.w_free)
    height, width = math.prod(rows), math.prod(columns)

    def as_matrices(value: Any, order: Sequence[int], shape: Sequence[Any], split: int) -> Any:
        """Arranges codes in one axis of rows and one of columns; `split` is where these begin."""
        value = graph.transpose(value, order, np.uint8)
        if len(order) == len(shared) + 2 and split == len(shared) + 1:
            return value
        return graph.reshape(value, [*shared, *shape], np.uint8)

    def lay_out(value: Any, dtype: Any) -> Any:
        """Brings [*shared, height, width] into the layout of the result."""
        if len(rows) != 1 or len(columns) != 1:
            value = graph.reshape(value, [*shared, *rows, *columns], dtype)
        return graph.transpose(value, axes.order, dtype)

    order = [*axes.x_shared, *axes.x_free, *axes.x_summed]
    x = as_matrices(graph.value(x_atom), order, [height, terms], len(shared) + len(rows))
    zeros = [np.uint8(layer.inputs["activations"].zero_point)]
    order = [*axes.w_shared, *axes.w_summed, *axes.w_free]
    if "other" in layer.inputs:
        split = len(shared) + len(axes.w_summed)
        w = as_matrices(graph.value(w_atom), order, [terms, width], split)
        zeros.append(np.uint8(layer.inputs["other"].zero_point))
    else:
        w = np.transpose(graph.known(w_atom), order)
        w = w.reshape(*sizes(w_atom, axes.w_shared), terms, width)
    to_float = out.dtype == jnp.float32
    fused = layer.output is not None and layer.weight_zero is None and not shared
    if to_float or (fused and "other" not in layer.inputs):

        def by_channel(array: Any) -> np.ndarray:
            array = contraction.align(array, len(axes.order)).transpose(np.argsort(axes.order))
            return np.broadcast_to(array, [1] * len(rows) + columns).ravel()

        result = _fuse(graph, "Gemm", x, w, layer, by_channel, [height, width])
        return lay_out(result, np.float32 if to_float else np.uint8)

    def multiply(w: Any) -> Any:
        factors = [x, w if "other" in layer.inputs else graph.weight(w), *zeros]
        total = graph.node("MatMulInteger", factors, np.int32, [*shared, height, width])
        return lay_out(total, np.int32)

    return _multiply(graph, multiply, w, layer, out)
