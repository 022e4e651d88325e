"""Operations in ONNX for which jax2onnx has no form."""

from typing import Any

import numpy as np
from jax.extend import core

from kdq.deploy import contraction
from kdq.deploy.formats.onnx import program as onnx_program
from kdq.deploy.formats.onnx.graph import Graph, convert
from kdq.deploy.formats.onnx.windows import cast, pad


@convert(onnx_program.conv_p, "Conv")
def _conv(graph: Graph, eqn: core.JaxprEqn) -> Any:
    """A convolution over any number of axes, of any layout."""
    kernel, out = contraction.conv(eqn.params), eqn.outvars[0].aval
    numbers, dtype = kernel.dimension_numbers, np.dtype(out.dtype)
    x, w = (graph.value(atom) for atom in eqn.invars)
    shape = [eqn.invars[0].aval.shape[axis] for axis in numbers.lhs_spec]
    x = graph.transpose(x, numbers.lhs_spec, dtype)
    # What is between the elements of the input, or cut off around them, has an operator of its own.
    config = [
        (min(low, 0), min(high, 0), step - 1)
        for (low, high), step in zip(kernel.padding, kernel.input_dilation, strict=True)
    ]
    fill = graph.constant(np.zeros((), dtype))
    x, _ = pad(graph, x, shape, [(0, 0, 0)] * 2 + config, fill, dtype)
    around = [max(pair[end], 0) for end in (0, 1) for pair in kernel.padding]
    sizes = [eqn.invars[1].aval.shape[axis] for axis in numbers.rhs_spec]
    result = graph.node(
        "Conv",
        [x, graph.transpose(w, numbers.rhs_spec, dtype)],
        dtype,
        [out.shape[axis] for axis in numbers.out_spec],
        pads=around,
        strides=list(kernel.strides),
        dilations=list(kernel.kernel_dilation),
        group=kernel.groups,
        kernel_shape=sizes[2:],
    )
    return graph.transpose(result, list(np.argsort(numbers.out_spec)), dtype)


@convert(onnx_program.pick_p, "GatherND")
def _pick(graph: Graph, eqn: core.JaxprEqn) -> Any:
    """Elements, or what is behind them, of several axes at once."""
    operand, indices = eqn.invars
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    dtype, rank, axes = np.dtype(out.dtype), operand.aval.ndim, list(numbers.start_index_map)
    value = graph.transpose(
        graph.value(operand), [*axes, *(axis for axis in range(rank) if axis not in axes)], dtype
    )
    picked = [axis for axis in range(out.ndim) if axis not in numbers.offset_dims]
    order = [*picked, *numbers.offset_dims]  # as GatherND has them
    places = cast(graph, graph.value(indices), indices.aval.shape, np.int64)
    result = graph.node("GatherND", [value, places], dtype, [out.shape[axis] for axis in order])
    return graph.transpose(result, list(np.argsort(order)), dtype)


@convert(onnx_program.remainder_p, "Mod")
def _remainder(graph: Graph, eqn: core.JaxprEqn) -> Any:
    """With the sign of what is divided."""
    out = eqn.outvars[0].aval
    values = [graph.value(atom) for atom in eqn.invars]
    return graph.node("Mod", values, np.dtype(out.dtype), out.shape, fmod=1)
