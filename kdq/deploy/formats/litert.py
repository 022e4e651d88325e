"""LiteRT: a simulated model as a .tflite file whose layers are integer operators.

The program goes through StableHLO. What a layer's input and weight are rounded to is written into
it as a pair of quantize and dequantize operations of the converter's own dialect, which it joins
with the operation between them. LiteRT then computes with int8 codes and fixed-point multipliers,
so an output may be a code away from that of integer JAX.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq.deploy import extras
from kdq.deploy.contraction import Conv
from kdq.deploy.formats import litert_program, rounded
from kdq.deploy.formats.rounded import ChannelWeight
from kdq.deploy.formats.runtime import Runtime, example_specs, flatten_inputs
from kdq.deploy.lower.model import IntegerModel
from kdq.deploy.qtensor import InputGrid
from kdq.quantize.inputs import Batch, Inputs
from kdq.types import Array

MARK = "kdq_rounded_"


class _Types(rounded.Rounding):
    """The quantized types of a program, each by the number of its mark."""

    def __init__(self) -> None:
        self.types: list[str] = []

    set_apart = staticmethod(litert_program.set_apart)
    bind = staticmethod(litert_program.bind)
    product = staticmethod(litert_program.product)

    def _marked(self, x: Array, quantized: str) -> Array:
        """Returns `x`, marked to be rounded to a quantized element type."""
        self.types.append(quantized)
        name = f"{MARK}{len(self.types) - 1}"
        return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, jnp.float32))(x)

    def input(self, x: Array, grid: InputGrid, of_two: bool) -> Array:
        """Rounds to int8 codes, those of kdq less 128."""
        if of_two and int(grid.top) < 255:
            # Its kernel for a product of two inputs rounds twice, which moves codes of few bits.
            return _on_grid(x, grid)
        scale, zero, top = (np.asarray(v) for v in (grid.scale, grid.zero_point, grid.top))
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


def _on_grid(x: Array, grid: InputGrid) -> Array:
    """Rounds an input to its grid by operations on floats."""
    scale, zero, top = (np.float32(v) for v in (grid.scale, grid.zero_point, grid.top))
    return (jnp.clip(jnp.round(x / scale) + zero, 0, top) - zero) * scale


def to_litert(lowered: IntegerModel, inputs: Batch) -> bytes:
    """Returns the contents of a .tflite file, for one example at a time.

    Args:
      lowered: see `lower`.
      inputs: of one batch, arrays with a leading batch axis; only the shapes matter.

    Raises:
      ImportError: litert-converter is not installed; says how to.
      ValueError: a weight that LiteRT has no type for, or an operation that it lacks.
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

    def write_pair(mark: re.Match) -> str:
        result, number, operand, shape = mark.groups()
        float_type = f"tensor<{shape}f32>"
        quantized = f"tensor<{shape}{types[int(number)]}>"
        return (
            f'%{MARK}{number} = "tfl.quantize"({operand}) <{{qtype = {quantized}}}> : '
            f"({float_type}) -> {quantized}\n"
            f'    {result} = "tfl.dequantize"(%{MARK}{number}) : ({quantized}) -> {float_type}'
        )

    pattern = (
        rf"(%\w+) = stablehlo\.custom_call @{MARK}(\d+)\((%\w+)\).*"
        r" : \(tensor<((?:\d+x)*)f32>\) -> .*"
    )
    return re.sub(pattern, write_pair, text)


def load_litert(model: str | os.PathLike[str] | bytes, *, threads: int | None = None) -> Runtime:
    """Loads a file into LiteRT, which computes one example of a batch after the other.

    Args:
      model: the file, or what is in it.
      threads: how many; None is LiteRT's own default.

    Raises:
      ImportError: ai-edge-litert is not installed; says how to.
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

    return Runtime(run, {"inputs": _describe(inputs), "outputs": _describe(outputs)})


def _describe(details: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": detail["name"],
            "shape": [int(size) for size in detail["shape"]],
            "dtype": np.dtype(detail["dtype"]).name,
        }
        for detail in details
    ]


def _interpreter(model: str | os.PathLike[str] | bytes, threads: int | None) -> Any:
    (runtime,) = extras.load("litert", "ai_edge_litert.interpreter")
    content = {"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)}
    return runtime.Interpreter(**content, num_threads=threads)
