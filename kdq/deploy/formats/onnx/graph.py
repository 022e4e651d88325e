"""Nodes of ONNX graphs, and how jax2onnx finds what writes them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx_ir
from jax.extend import core
from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

from kdq.deploy.formats.onnx.program import NoForm


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


def register(*primitives: core.Primitive) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
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

        for primitive in primitives:
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
