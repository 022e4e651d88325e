"""Operations in ONNX that quantize, move and look up numbers: converters that jax2onnx calls."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from jax.extend import core

from kdq.deploy import primitives
from kdq.deploy.contraction import align
from kdq.deploy.formats.onnx import program as onnx_program
from kdq.deploy.formats.onnx.graph import Graph, register
from kdq.deploy.formats.onnx.program import NoForm


@register(primitives.quantize.primitive, "QuantizeLinear")
def _quantize(graph: Graph, eqn: core.JaxprEqn) -> Any:
    x, grid = primitives.arguments(eqn)
    grid = graph.known(grid)
    return graph.to_codes(graph.value(x), grid.scale, grid, eqn.outvars[0].aval.shape)


@register(onnx_program.round_int8_p, "QuantizeLinear")
def _int8_pair(graph: Graph, eqn: core.JaxprEqn) -> Any:
    scale, shape = graph.known(eqn.invars[1]), eqn.outvars[0].aval.shape
    inputs = [graph.value(eqn.invars[0]), graph.constant(scale), graph.constant(np.int8(0))]
    codes = graph.node("QuantizeLinear", inputs, np.int8, shape)
    return graph.from_codes(codes, scale, np.int8(0), shape)


@register(onnx_program.int8_weight_p, "DequantizeLinear")
def _int8_weight_codes(graph: Graph, eqn: core.JaxprEqn) -> Any:
    codes, scale = graph.known(eqn.invars[0]), graph.known(eqn.invars[1])
    zeros, axis = np.zeros(len(scale), np.int8), eqn.params["axis"]
    return graph.from_codes(graph.constant(codes), scale, zeros, codes.shape, axis=axis)


@register(primitives.dequantize.primitive, "DequantizeLinear")
def _dequantize(graph: Graph, eqn: core.JaxprEqn) -> Any:
    codes, grid = primitives.arguments(eqn)
    grid, shape = graph.known(grid), eqn.outvars[0].aval.shape
    return graph.from_codes(graph.value(codes), grid.scale, np.uint8(grid.zero_point), shape)


@register(primitives.to_float.primitive, "Cast")
def _to_float(graph: Graph, eqn: core.JaxprEqn) -> Any:
    total, scale = eqn.invars
    return graph.scaled(graph.value(total), graph.value(scale), eqn.outvars[0].aval.shape)


@register(onnx_program.reshape_p, "Reshape")
def _reshape(graph: Graph, eqn: core.JaxprEqn) -> Any:
    value = graph.value(eqn.invars[0])
    return graph.reshape(value, eqn.params["shape"], eqn.outvars[0].aval.dtype)


def _write_node(op: str, **attributes: Any) -> Callable[[Graph, core.JaxprEqn], Any]:
    """Returns the converter of a primitive that is one node."""

    def write(graph: Graph, eqn: core.JaxprEqn) -> Any:
        out = eqn.outvars[0].aval
        values = [graph.value(atom) for atom in eqn.invars]
        return graph.node(op, values, np.dtype(out.dtype), out.shape, **attributes)

    return write


register(onnx_program.matmul_p, "MatMul")(_write_node("MatMul"))
register(onnx_program.add_p, "Add")(_write_node("Add"))
register(onnx_program.remainder_p, "Mod")(_write_node("Mod", fmod=1))  # signed as what is divided


@register(onnx_program.slice_p, "Slice")
def _slice(graph: Graph, eqn: core.JaxprEqn) -> Any:
    shape, out, params = eqn.invars[0].aval.shape, eqn.outvars[0].aval, eqn.params
    axes = [axis for axis, size in enumerate(shape) if isinstance(size, int)]
    steps = params["strides"] or [1] * len(shape)
    lists = (params["start_indices"], params["limit_indices"], range(len(shape)), steps)
    bounds = [graph.constant(np.int64([numbers[axis] for axis in axes])) for numbers in lists]
    return graph.node("Slice", [graph.value(eqn.invars[0]), *bounds], out.dtype, out.shape)


@register(primitives.weight.primitive, "DequantizeLinear")
def _weight(graph: Graph, eqn: core.JaxprEqn) -> Any:
    weight = graph.known(primitives.arguments(eqn)[0])
    codes, shape = weight.codes, weight.codes.shape
    scale, zero = align(weight.scale, len(shape)), weight.zero_point
    along = [axis for axis, size in enumerate(scale.shape) if size > 1]
    groups = [axis for axis in along if scale.shape[axis] != shape[axis]]
    if weight.levels is not None:
        return _levels(graph, codes, np.float32(weight.levels), scale)
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
        zero = sized(align(zero, len(shape))).astype(codes.dtype)
    elif codes.dtype == np.int8:  # ONNX Runtime's session.x64quantprecision makes one of a scalar
        zero = np.zeros_like(sized(scale), np.int8)
    return graph.from_codes(graph.constant(codes), sized(scale), zero, shape, **at)


def _levels(graph: Graph, codes: np.ndarray, levels: np.ndarray, scale: np.ndarray) -> Any:
    """Writes a weight of a number format."""
    shape = codes.shape
    few = np.asarray(codes).astype(ml_dtypes.uint4 if len(levels) <= 16 else np.uint8)
    index = graph.cast(graph.constant(few), shape, np.int32)
    value = graph.node("Gather", [graph.constant(levels), index], np.float32, shape, axis=0)
    # Each axis as its groups and what is in one.
    sizes = [s for n, groups in zip(shape, scale.shape, strict=True) for s in (groups, n // groups)]
    value = graph.reshape(value, sizes, np.float32)
    scale = graph.constant(scale.reshape([s for groups in scale.shape for s in (groups, 1)]))
    scaled = graph.node("Mul", [value, scale], np.float32, sizes)
    return graph.reshape(scaled, shape, np.float32)


@register(primitives.rows.primitive, "Gather")
def _rows(graph: Graph, eqn: core.JaxprEqn) -> Any:
    indices, table = primitives.arguments(eqn)
    indices, table, shape = graph.value(indices), graph.known(table), eqn.outvars[0].aval.shape

    def pick(value: Any, array: np.ndarray) -> Any:
        """Writes the rows of what has one for each row of the table."""
        if array.shape[0] == 1:
            return value
        # A scale of a row has one column.
        return graph.node("Gather", [value, indices], array.dtype, [*shape[:-1], array.shape[-1]])

    if table.levels is not None:
        index = pick(graph.constant(table.codes.astype(np.int32)), table.codes)
        levels = graph.constant(np.float32(table.levels))
        floats = graph.node("Gather", [levels, index], np.float32, shape, axis=0)
    else:
        codes = pick(graph.weight(table.codes), np.asarray(table.codes).astype(np.int8))
        floats = graph.cast(codes, shape, np.float32)
    if table.zero_point is not None:
        zero = np.float32(table.zero_point)
        floats = graph.node("Sub", [floats, pick(graph.constant(zero), zero)], np.float32, shape)
    scale = np.float32(table.scale)
    return graph.node("Mul", [floats, pick(graph.constant(scale), scale)], np.float32, shape)


@register(onnx_program.pick_p, "GatherND")
def _pick(graph: Graph, eqn: core.JaxprEqn) -> Any:
    """Writes elements, or what is behind them, of several axes at once."""
    operand, indices = eqn.invars
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    dtype, rank, axes = np.dtype(out.dtype), operand.aval.ndim, list(numbers.start_index_map)
    value = graph.transpose(
        graph.value(operand), [*axes, *(axis for axis in range(rank) if axis not in axes)], dtype
    )
    picked = [axis for axis in range(out.ndim) if axis not in numbers.offset_dims]
    order = [*picked, *numbers.offset_dims]  # as GatherND has them
    places = graph.cast(graph.value(indices), indices.aval.shape, np.int64)
    result = graph.node("GatherND", [value, places], dtype, [out.shape[axis] for axis in order])
    return graph.transpose(result, list(np.argsort(order)), dtype)
