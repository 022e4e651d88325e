"""Nodes of ONNX graphs, how jax2onnx finds what writes them, and operations that move numbers.

`products` and `windows` write the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import onnx_ir
from jax.extend import core
from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

from kdq.deploy import primitives
from kdq.deploy.contraction import align
from kdq.deploy.formats.onnx import program as onnx_program
from kdq.deploy.formats.onnx.program import NoForm
from kdq.deploy.qtensor import InputGrid, QTensor


class Graph:
    """Adds nodes to the graph that jax2onnx builds. Where they take a value, an array will do."""

    def __init__(self, context: Any):
        self.context = context

    def node(self, op: str, inputs: Sequence[Any], dtype: Any, shape: Sequence[Any], **attributes):
        """Adds a node; returns its value."""
        values = [x if isinstance(x, onnx_ir.Value) else self.constant(x) for x in inputs]
        build = getattr(self.context.builder, op)
        value = build(*values, _outputs=[self.context.fresh_name(op)], **attributes)
        value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(dtype)))
        value.shape = onnx_ir.Shape([_dimension(size) for size in shape])
        return value

    def constant(self, array: Any) -> Any:
        """Adds an array that the file holds."""
        name = self.context.fresh_name("constant")
        return self.context.builder.add_initializer_from_array(name, np.asarray(array))

    def value(self, atom: Any) -> Any:
        """Returns the value that an array of the program has in the graph."""
        return self.context.get_value_for_var(atom)

    def known(self, tree: Any) -> Any:
        """Returns the arrays of a pytree of atoms, which must not depend on the input."""

        def array_of(atom: Any) -> np.ndarray:
            if isinstance(atom, core.Literal):
                return np.asarray(atom.val)
            array = self.context.try_evaluate_const(atom)
            if array is None:
                raise NoForm("an ONNX model has the weights and scales of its layers as constants")
            return array

        return jax.tree.map(array_of, tree)

    def transpose(self, value: Any, permutation: Sequence[int], dtype: Any) -> Any:
        if list(permutation) == sorted(permutation):
            return value
        shape = [value.shape[axis] for axis in permutation]
        return self.node("Transpose", [value], dtype, shape, perm=list(map(int, permutation)))

    def reshape(self, value: Any, shape: Sequence[Any], dtype: Any) -> Any:
        """Reshapes to a shape with at most one size that is not a number."""
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        return self.node("Reshape", [value, np.int64(sizes)], dtype, shape)

    def cast(self, value: Any, shape: Sequence[Any], dtype: Any) -> Any:
        """Makes an array of another type."""
        to = onnx_ir.DataType.from_numpy(np.dtype(dtype)).value
        return self.node("Cast", [value], dtype, shape, to=to)

    def to_codes(self, value: Any, grid: Any, shape: Sequence[Any], scale: Any = None) -> Any:
        """Makes uint8 codes of a grid of floats, at its scale or another."""
        steps = [np.float32(grid.scale if scale is None else scale), np.uint8(grid.zero_point)]
        codes = self.node("QuantizeLinear", [value, *steps], np.uint8, shape)
        if grid.top >= 255:
            return codes
        return self.node("Clip", [codes, np.uint8(0), np.uint8(grid.top)], np.uint8, shape)

    def from_codes(self, codes: Any, scale: Any, zero: Any, shape: Sequence[Any], **at: Any) -> Any:
        """Makes floats of codes, `(codes - zero) * scale`; a weight without zero has no kernel."""
        inputs = [codes, np.float32(scale), *([] if zero is None else [zero])]
        return self.node("DequantizeLinear", inputs, np.float32, shape, **at)

    def weight(self, codes: np.ndarray) -> Any:
        """Adds int8 codes, stored in as few bits as they have."""
        stored = self.constant(codes)
        return stored if codes.dtype == np.int8 else self.cast(stored, codes.shape, np.int8)

    def scaled(self, total: Any, scale: Any, shape: Sequence[Any]) -> Any:
        """Multiplies int32 sums by a scale."""
        return self.node("Mul", [self.cast(total, shape, np.float32), scale], np.float32, shape)


def _dimension(size: Any) -> Any:
    if isinstance(size, int | np.integer):
        return int(size)
    return size if isinstance(size, onnx_ir.SymbolicDim) else str(size)


def register(*written: core.Primitive) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what writes the equations of primitives: `write(graph, out, *inputs, **params)`.

    It returns the value of the output, whose shape and dtype are `out`; inputs are atoms, those of
    an `Operation` in the pytrees that it was called with.
    """

    def decorate(write: Callable[..., Any]) -> Callable[..., Any]:
        class Plugin(PrimitiveLeafPlugin):
            def lower(self, ctx: Any, eqn: core.JaxprEqn) -> None:
                params, inputs = dict(eqn.params), eqn.invars
                if "structure" in params:
                    inputs = jax.tree.unflatten(params.pop("structure"), inputs)
                value = write(Graph(ctx), eqn.outvars[0].aval, *inputs, **params)
                ctx.bind_value_for_var(eqn.outvars[0], value)

        for primitive in written:
            register_primitive(
                jaxpr_primitive=primitive.name,
                jax_doc="",
                onnx=[{"component": primitive.name, "doc": "https://onnx.ai/onnx/operators/"}],
                since="",
                context="kdq",
                component=primitive.name,
                testcases=[],
            )(Plugin)
        return write

    return decorate


# Primitives that are one node, with its attributes.
NODES = {
    onnx_program.matmul_p: ("MatMul", {}),
    onnx_program.add_p: ("Add", {}),
    onnx_program.remainder_p: ("Mod", {"fmod": 1}),  # signed as what is divided
}
for _primitive, (_op, _attributes) in NODES.items():
    register(_primitive)(
        lambda graph, out, *inputs, op=_op, attributes=_attributes: graph.node(
            op, [graph.value(x) for x in inputs], out.dtype, out.shape, **attributes
        )
    )


@register(primitives.quantize.primitive)
def _quantize(graph: Graph, out: Any, x: core.Var, grid: InputGrid) -> Any:
    return graph.to_codes(graph.value(x), graph.known(grid), out.shape)


@register(primitives.dequantize.primitive)
def _dequantize(graph: Graph, out: Any, codes: core.Var, grid: InputGrid) -> Any:
    grid = graph.known(grid)
    return graph.from_codes(graph.value(codes), grid.scale, np.uint8(grid.zero_point), out.shape)


@register(onnx_program.round_int8_p)
def _round_int8(graph: Graph, out: Any, x: core.Var, scale: core.Var) -> Any:
    scale, zero = graph.known(scale), np.int8(0)
    codes = graph.node("QuantizeLinear", [graph.value(x), scale, zero], np.int8, out.shape)
    return graph.from_codes(codes, scale, zero, out.shape)


@register(onnx_program.int8_weight_p)
def _int8_weight(graph: Graph, out: Any, codes: core.Var, scale: core.Var, *, axis: int) -> Any:
    codes, scale = graph.known((codes, scale))
    return graph.from_codes(codes, scale, np.zeros(len(scale), np.int8), out.shape, axis=axis)


@register(primitives.to_float.primitive)
def _to_float(graph: Graph, out: Any, total: core.Var, scale: core.Var) -> Any:
    return graph.scaled(graph.value(total), graph.value(scale), out.shape)


@register(onnx_program.reshape_p)
def _reshape(graph: Graph, out: Any, x: core.Var, *, shape: tuple) -> Any:
    return graph.reshape(graph.value(x), shape, out.dtype)


@register(onnx_program.slice_p)
def _slice(graph: Graph, out: Any, x: core.Var, **params: Any) -> Any:
    shape = x.aval.shape
    axes = [axis for axis, size in enumerate(shape) if isinstance(size, int)]
    steps = params["strides"] or [1] * len(shape)
    lists = (params["start_indices"], params["limit_indices"], range(len(shape)), steps)
    bounds = [np.int64([numbers[axis] for axis in axes]) for numbers in lists]
    return graph.node("Slice", [graph.value(x), *bounds], out.dtype, out.shape)


@register(primitives.weight.primitive)
def _weight(graph: Graph, out: Any, weight: QTensor) -> Any:
    weight, shape = graph.known(weight), out.shape
    codes, scale, zero = weight.codes, align(weight.scale, len(shape)), weight.zero_point
    if weight.levels is not None:
        few = np.asarray(codes).astype(ml_dtypes.uint4 if len(weight.levels) <= 16 else np.uint8)
        index = graph.cast(graph.constant(few), shape, np.int32)
        values = [np.float32(weight.levels), index]
        value = graph.node("Gather", values, np.float32, shape, axis=0)
        # Each axis as its groups and what is in one.
        pairs = list(zip(shape, scale.shape, strict=True))
        sizes = [s for n, groups in pairs for s in (groups, n // groups)]
        value = graph.reshape(value, sizes, np.float32)
        scale = scale.reshape([s for _, groups in pairs for s in (groups, 1)])
        scaled = graph.node("Mul", [value, scale], np.float32, sizes)
        return graph.reshape(scaled, shape, np.float32)
    along = [axis for axis, size in enumerate(scale.shape) if size > 1]
    groups = [axis for axis in along if scale.shape[axis] != shape[axis]]
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
    sized = lambda array: np.broadcast_to(array, sizes) if groups else array.reshape(sizes)
    if zero is not None:
        zero = sized(align(zero, len(shape))).astype(codes.dtype)
    elif codes.dtype == np.int8:  # ONNX Runtime's session.x64quantprecision makes one of a scalar
        zero = np.zeros_like(sized(scale), np.int8)
    return graph.from_codes(codes, sized(scale), zero, shape, **at)


@register(primitives.rows.primitive)
def _rows(graph: Graph, out: Any, indices: core.Var, table: QTensor) -> Any:
    indices, table, shape = graph.value(indices), graph.known(table), out.shape

    def pick(value: Any, array: np.ndarray) -> Any:
        """Writes the rows of what has one for each row of the table."""
        if array.shape[0] == 1:
            return value
        # A scale of a row has one column.
        return graph.node("Gather", [value, indices], array.dtype, [*shape[:-1], array.shape[-1]])

    if table.levels is not None:
        index = pick(graph.constant(table.codes.astype(np.int32)), table.codes)
        levels = np.float32(table.levels)
        floats = graph.node("Gather", [levels, index], np.float32, shape, axis=0)
    else:
        codes = pick(graph.weight(table.codes), np.asarray(table.codes).astype(np.int8))
        floats = graph.cast(codes, shape, np.float32)
    if table.zero_point is not None:
        zero = np.float32(table.zero_point)
        floats = graph.node("Sub", [floats, pick(zero, zero)], np.float32, shape)
    scale = np.float32(table.scale)
    return graph.node("Mul", [floats, pick(scale, scale)], np.float32, shape)


@register(onnx_program.pick_p)
def _pick(graph: Graph, out: Any, operand: core.Var, indices: core.Var, **params: Any) -> Any:
    """Writes elements, or what is behind them, of several axes at once."""
    numbers, dtype = params["dimension_numbers"], np.dtype(out.dtype)
    axes = list(numbers.start_index_map)
    behind = [axis for axis in range(operand.aval.ndim) if axis not in axes]
    value = graph.transpose(graph.value(operand), [*axes, *behind], dtype)
    picked = [axis for axis in range(out.ndim) if axis not in numbers.offset_dims]
    order = [*picked, *numbers.offset_dims]  # as GatherND has them
    places = graph.cast(graph.value(indices), indices.aval.shape, np.int64)
    result = graph.node("GatherND", [value, places], dtype, [out.shape[axis] for axis in order])
    return graph.transpose(result, np.argsort(order), dtype)
