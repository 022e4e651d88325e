"""LiteRT: a simulated model as a .tflite file whose layers are integer operators.

The program goes through StableHLO. What a layer's input and weight are rounded to is written into
it as a pair of quantize and dequantize operations of the converter's own dialect, which it joins
with the operation between them. LiteRT then computes with int8 codes and fixed-point multipliers,
so an output may be a code away from that of integer JAX.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from kdq.deploy import contraction, extras, jaxprs, primitives
from kdq.deploy.contraction import Conv, Dot, Kernel
from kdq.deploy.formats import rounded
from kdq.deploy.formats.rounded import ChannelWeight
from kdq.deploy.formats.runtime import Runtime, example_specs, flatten_inputs
from kdq.deploy.lower.model import IntegerModel
from kdq.deploy.qtensor import InputGrid
from kdq.quantize.inputs import Batch, Inputs
from kdq.types import Array

MARK = "kdq_rounded_"
# The least normal number: to add it changes no number, and the converter, which lets a rounding
# move back through operations that move numbers, stops at an addition.
LEAST = np.finfo(np.float32).tiny
MOST_AXES = 3  # of an array that a matrix multiplies


class _Types(rounded.Rounding):
    """The quantized types of a program, each by the number of its mark."""

    def __init__(self) -> None:
        self.types: list[str] = []

    def set_apart(self, x: Array) -> Array:
        """Returns an array that nothing before is rounded for.

        The converter would round what a maximum, a mean or a concatenation is made of, to the grid
        of the result, and with it all else that takes it.
        """
        return x + LEAST

    def _marked(self, x: Array, quantized: str) -> Array:
        """Returns `x`, marked to be rounded to a quantized element type."""
        self.types.append(quantized)
        name = f"{MARK}{len(self.types) - 1}"
        return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, jnp.float32))(x)

    def input(self, x: Array, grid: InputGrid, of_two: bool) -> Array:
        """Rounds to int8 codes, those of kdq less 128."""
        scale, zero, top = (np.float32(v) for v in (grid.scale, grid.zero_point, grid.top))
        if of_two and top < 255:
            # Its kernel for a product of two inputs rounds twice, which moves codes of few bits.
            return (jnp.clip(jnp.round(x / scale) + zero, 0, top) - zero) * scale
        if top < 255:  # the operators know no fewer codes than 256
            low, high = (np.float32(scale * (code - zero)) for code in (0, int(top)))
            x = jnp.clip(x, low, high)
        return self._marked(x, f"!quant.uniform<i8:f32, {float(scale)!r}:{int(zero) - 128}>")

    def weight(self, weight: ChannelWeight) -> Array:
        """Returns the numbers of a weight, with one scale if all are alike."""
        shape = [1] * weight.codes.ndim
        shape[weight.axis] = -1
        scale = np.float32(weight.scale)
        with jax.ensure_compile_time_eval():
            values = jnp.asarray(weight.codes.astype(np.float32) * scale.reshape(shape))
        element = f"!quant.uniform<i{weight.bits}:f32"
        if (scale == scale[0]).all():
            return self._marked(values, f"{element}, {float(scale[0])!r}>")
        scales = ", ".join(repr(float(number)) for number in scale)
        return self._marked(values, f"{element}:{weight.axis}, {{{scales}}}>")

    def convolve(self, kernel: Conv, x: Array, weight: ChannelWeight) -> Array:
        """Convolves in 8 bits: LiteRT's kernel for 4 is a hundred times slower, and inexact."""
        return super().convolve(kernel, x, weight._replace(bits=8))

    def product(self, kernel: Kernel, x: Array, w: Array) -> Array:
        """Returns the product of floats in a form that the converter gets right."""
        if isinstance(kernel, Conv):
            return self._convolution(kernel, x, w)
        (summed, shared), last = kernel.dimension_numbers, x.ndim - 1
        if x.ndim > MOST_AXES and w.ndim == 2 and summed == ((last,), (0,)) and shared == ((), ()):
            # Its product of a matrix and rows loses count of axes of one element, unless what is
            # added to it keeps the reshapes away.
            rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
            total = super().product(Dot((((1,), (0,)), ((), ())), 2), rows, w) + LEAST
            return total.reshape(*x.shape[:-1], w.shape[1])
        return super().product(kernel, x, w)

    def _convolution(self, kernel: Conv, x: Array, w: Array) -> Array:
        """Computes a transposed one whole, then cuts it: LiteRT pads these in another way."""
        if set(kernel.input_dilation) == {1}:
            return super().product(kernel, x, w)
        numbers = kernel.dimension_numbers
        sizes = [w.shape[axis] for axis in numbers.rhs_spec[2:]]
        reach = [
            (size - 1) * step for size, step in zip(sizes, kernel.kernel_dilation, strict=True)
        ]
        whole = [
            (max(low, most), max(high, most))
            for (low, high), most in zip(kernel.padding, reach, strict=True)
        ]
        if set(kernel.strides) != {1}:
            whole = list(kernel.padding)
        total = super().product(dataclasses.replace(kernel, padding=tuple(whole)), x, w)
        for axis, kept, padded in zip(numbers.out_spec[2:], kernel.padding, whole, strict=True):
            low, high = padded[0] - kept[0], padded[1] - kept[1]
            total = lax.slice_in_dim(total, low, total.shape[axis] - high, axis=axis)
        return total

    def bind(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
        """Runs an equation in a form that the converter gets right."""
        name, params = eqn.primitive.name, eqn.params
        if not any(isinstance(value, jax.core.Tracer) for value in values):
            return jaxprs.bind(eqn, values)
        if name == "conv_general_dilated" and params["batch_group_count"] == 1:
            return [self.product(contraction.conv(params), *values)]
        if name == "dot_general":
            kernel = Dot(params["dimension_numbers"], eqn.invars[0].aval.ndim)
            return [self.product(kernel, *values)]
        if eqn.primitive is primitives.rows.primitive:
            indices, table = jax.tree.unflatten(params["structure"], values)
            with jax.ensure_compile_time_eval():  # LiteRT looks up no fewer bits than 8
                table = table.replace(codes=table.codes.astype(jnp.int8))
            return [table.rows(indices)]
        return jaxprs.bind(eqn, values)


def to_litert(lowered: IntegerModel, inputs: Batch) -> bytes:
    """Returns the contents of a .tflite file, for one example at a time.

    `inputs` are of one batch, arrays with a leading batch axis, of which only the shapes matter.
    Raises ImportError if litert-converter is not installed, ValueError for a weight that LiteRT has
    no type for, or an operation that it lacks.
    """
    ir, passes, converter = extras.load(
        "litert",
        "litert_converter.mlir.ir",
        "litert_converter.mlir.passmanager",
        "litert_converter.mlir._mlir_libs.converter_api_ext",
    )
    rounding = _Types()
    run = lambda inputs: rounded.run(lowered, rounding, inputs)
    forward, specs = flatten_inputs(run, example_specs(inputs, 1))
    text = jax.jit(forward, keep_unused=True).lower(*specs).as_text(dialect="stablehlo")
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(_with_types(text, rounding.types))
        options = converter.ConvertToTFLConfig()
        options.qdq_conversion_mode = "STATIC"
        options.strict_qdq_mode = True  # inputs and outputs stay floats
        try:
            converter.run_convert_to_tfl_passes(module, passes.PassManager(), options)
            data = converter.export_flatbuffer_to_bytes(module.operation)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"its converter: {_in_short(error)}") from error
    try:
        _interpreter(data, None).allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"its runtime: {_in_short(error)}") from error
    return data


def _in_short(error: Exception) -> str:
    """Returns the message of an error of LiteRT, in one line."""
    operator = re.search(r"error: (.*)|builtin opcode '(\w+)'", str(error))
    if operator is None:
        return str(error).strip().splitlines()[0]
    return operator[1] or f"it has no operator {operator[2]}"


def _with_types(text: str, types: Sequence[str]) -> str:
    """Replaces the marks of StableHLO by quantization."""
    pattern = (
        rf"(%\w+) = stablehlo\.custom_call @{MARK}(\d+)\((%\w+)\).*"
        r" : \(tensor<((?:\d+x)*)f32>\) -> .*"
    )

    def write_pair(mark: re.Match) -> str:
        result, number, operand, shape = mark.groups()
        floats, quantized = f"tensor<{shape}f32>", f"tensor<{shape}{types[int(number)]}>"
        return (
            f'%{MARK}{number} = "tfl.quantize"({operand}) <{{qtype = {quantized}}}> : '
            f"({floats}) -> {quantized}\n"
            f'    {result} = "tfl.dequantize"(%{MARK}{number}) : ({quantized}) -> {floats}'
        )

    return re.sub(pattern, write_pair, text)


def load_litert(model: str | os.PathLike[str] | bytes, *, threads: int | None = None) -> Runtime:
    """Loads a file, or what is in it, into LiteRT, which computes one example after the other.

    `threads` of None is LiteRT's own default. Raises ImportError without ai-edge-litert.
    """
    interpreter = _interpreter(model, threads)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(batch: Inputs) -> tuple[np.ndarray, ...]:
        arrays = jax.tree.leaves(batch)
        rows: list[list[np.ndarray]] = [[] for _ in outputs]
        for i in range(len(arrays[0])):
            for detail, array in zip(inputs, arrays, strict=True):
                interpreter.set_tensor(detail["index"], array[i : i + 1].astype(detail["dtype"]))
            interpreter.invoke()
            for detail, results in zip(outputs, rows, strict=True):
                results.append(interpreter.get_tensor(detail["index"]))
        return tuple(map(np.concatenate, rows))

    describe = lambda detail: {
        "name": detail["name"],
        "shape": [int(size) for size in detail["shape"]],
        "dtype": np.dtype(detail["dtype"]).name,
    }
    signature = {"inputs": [*map(describe, inputs)], "outputs": [*map(describe, outputs)]}
    return Runtime(run, signature)


def _interpreter(model: str | os.PathLike[str] | bytes, threads: int | None) -> Any:
    (runtime,) = extras.load("litert", "ai_edge_litert.interpreter")
    content = {"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)}
    return runtime.Interpreter(**content, num_threads=threads)
