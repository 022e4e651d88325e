"""Nodes of ONNX graphs, and how jax2onnx finds what writes them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import onnx_ir
from jax.extend import core
from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

from kdq.deploy.formats.onnx.program import NoForm


class Graph:
    """Adds nodes to the graph that jax2onnx builds."""

    def __init__(self, context: Any):
        self.context = context

    def node(self, op: str, inputs: Sequence[Any], dtype: Any, shape: Sequence[Any], **attributes):
        """The value of a new node."""
        build = getattr(self.context.builder, op)
        value = build(*inputs, _outputs=[self.context.fresh_name(op)], **attributes)
        value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(dtype)))
        value.shape = onnx_ir.Shape([_dimension(size) for size in shape])
        return value

    def constant(self, array: Any) -> Any:
        name = self.context.fresh_name("constant")
        return self.context.builder.add_initializer_from_array(name, np.asarray(array))

    def value(self, atom: Any) -> Any:
        """What the graph knows an array of the program as."""
        return self.context.get_value_for_var(atom)

    def known(self, tree: Any) -> Any:
        """The arrays of a pytree of atoms, which must not depend on the input."""

        def one(atom: Any) -> np.ndarray:
            if isinstance(atom, core.Literal):
                return np.asarray(atom.val)
            array = self.context.try_evaluate_const(atom)
            if array is None:
                raise NoForm("an ONNX model has the weights and scales of its layers as constants")
            return array

        return jax.tree.map(one, tree)

    def transpose(self, value: Any, permutation: Sequence[int], dtype: Any) -> Any:
        if list(permutation) == sorted(permutation):
            return value
        shape = [value.shape[axis] for axis in permutation]
        return self.node("Transpose", [value], dtype, shape, perm=list(map(int, permutation)))

    def reshape(self, value: Any, shape: Sequence[Any], dtype: Any) -> Any:
        """To a shape with at most one size that is not a number."""
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        return self.node("Reshape", [value, self.constant(np.int64(sizes))], dtype, shape)

    def clip(self, codes: Any, grid: Any, shape: Sequence[Any]) -> Any:
        """uint8 codes within those of a grid."""
        if grid.top >= 255:
            return codes
        inputs = [codes, self.constant(np.uint8(0)), self.constant(np.uint8(grid.top))]
        return self.node("Clip", inputs, np.uint8, shape)

    def to_codes(self, value: Any, scale: Any, grid: Any, shape: Sequence[Any]) -> Any:
        """uint8 codes of floats at a scale, all within those of a grid."""
        inputs = [value, self.constant(np.float32(scale)), self.constant(np.uint8(grid.zero_point))]
        return self.clip(self.node("QuantizeLinear", inputs, np.uint8, shape), grid, shape)

    def from_codes(self, codes: Any, scale: Any, zero: Any, shape: Sequence[Any], **at: Any) -> Any:
        """floats of codes: `(codes - zero) * scale`; a weight without a zero finds no kernel."""
        inputs = [codes, self.constant(np.float32(scale))]
        inputs += [] if zero is None else [self.constant(zero)]
        return self.node("DequantizeLinear", inputs, np.float32, shape, **at)

    def weight(self, codes: np.ndarray) -> Any:
        """int8 codes, stored in as few bits as they have."""
        stored = self.constant(codes)
        if codes.dtype == np.int8:
            return stored
        return self.node("Cast", [stored], np.int8, codes.shape, to=onnx_ir.DataType.INT8.value)


def _dimension(size: Any) -> Any:
    if isinstance(size, int | np.integer):
        return int(size)
    return size if isinstance(size, onnx_ir.SymbolicDim) else str(size)


def convert(primitive: core.Primitive, operator: str):
    """Registers a function `(graph, eqn) -> value` as the converter of a primitive."""

    def register(write):
        class Plugin(PrimitiveLeafPlugin):
            def lower(self, ctx: Any, eqn: core.JaxprEqn) -> None:
                ctx.bind_value_for_var(eqn.outvars[0], write(Graph(ctx), eqn))

        register_primitive(
            jaxpr_primitive=primitive.name,
            jax_doc="",
            onnx=[{"component": operator, "doc": "https://onnx.ai/onnx/operators/"}],
            since="",
            context="kdq",
            component=primitive.name,
            testcases=[],
        )(Plugin)
        return write

    return register
