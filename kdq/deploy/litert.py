"""LiteRT: a simulated model as a .tflite file whose layers are integer operators.

The program goes through StableHLO. What a layer's input and weight are rounded to is written into
it as a pair of quantize and dequantize operations of the converter's own dialect, which it joins
with the operation between them. LiteRT then computes with int8 codes and fixed-point multipliers,
so an output may be a code away from that of integer JAX.
"""

import os
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdq import files
from kdq.deploy import extras, rounded
from kdq.deploy.contraction import Conv
from kdq.deploy.lowering import IntegerModel
from kdq.deploy.qtensor import InputGrid
from kdq.quantize.layers import batch_specs
from kdq.types import Array

MARK = "kdq_rounded_"


class _Types(rounded.Rounding):
    """The quantized types of a program, each by the number of its mark."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def _marked(self, x: Array, quantized: str) -> Array:
        """`x`, marked to be rounded to a quantized element type."""
        self.found.append(quantized)
        name = f"{MARK}{len(self.found) - 1}"
        return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, jnp.float32))(x)

    def input(self, x: Array, grid: InputGrid, of_two: bool) -> Array:
        """int8 codes, those of kdq less 128."""
        if of_two and int(grid.top) < 255:
            # Its kernel for a product of two inputs rounds twice, which moves codes of few bits.
            return _on_grid(x, grid)
        scale, zero, top = (np.asarray(v) for v in (grid.scale, grid.zero_point, grid.top))
        if top < 255:  # the operators know no fewer codes than 256
            low, high = (np.float32(scale * (code - zero)) for code in (0, int(top)))
            x = jnp.clip(x, low, high)
        return self._marked(x, f"!quant.uniform<i8:f32, {float(scale)!r}:{int(zero) - 128}>")

    def weight(self, codes: np.ndarray, scale: np.ndarray, axis: int, bits: int) -> Array:
        """With one scale if all are alike."""
        shape = [1] * codes.ndim
        shape[axis] = -1
        scale = np.float32(scale)
        with jax.ensure_compile_time_eval():
            values = jnp.asarray(codes.astype(np.float32) * scale.reshape(shape))
        if (scale == scale[0]).all():
            kind = f"!quant.uniform<i{bits}:f32, {float(scale[0])!r}>"
        else:
            scales = ", ".join(repr(float(one)) for one in scale)
            kind = f"!quant.uniform<i{bits}:f32:{axis}, {{{scales}}}>"
        return self._marked(values, kind)

    def convolve(
        self, kernel: Conv, x: Array, codes: np.ndarray, scale: np.ndarray, bits: int
    ) -> Array:
        """In 8 bits: its kernel for convolutions with 4 is a hundred times slower, and inexact."""
        return super().convolve(kernel, x, codes, scale, 8)


def _on_grid(x: Array, grid: InputGrid) -> Array:
    """An input rounded to its grid by operations on floats."""
    scale, zero, top = (np.float32(v) for v in (grid.scale, grid.zero_point, grid.top))
    return (jnp.clip(jnp.round(x / scale) + zero, 0, top) - zero) * scale


def to_litert(lowered: IntegerModel, inputs: Array | tuple) -> bytes:
    """The contents of a .tflite file, for one example at a time.

    Args:
      lowered: see `lower`.
      inputs: an array with a leading batch axis, or a tuple of these; only the shapes matter.

    Raises:
      ImportError: litert-converter is not installed; says how to.
      ValueError: a weight that LiteRT has no type for.
    """
    ir, passes, converter = extras.load(
        "litert",
        "litert_converter.mlir.ir",
        "litert_converter.mlir.passmanager",
        "litert_converter.mlir._mlir_libs.converter_api_ext",
    )
    specs = batch_specs(inputs, 1)
    types = _Types()

    text = jax.jit(rounded.forward(lowered, types)).lower(*specs).as_text(dialect="stablehlo")
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(_with_types(text, types.found))
        options = converter.ConvertToTFLConfig()
        options.qdq_conversion_mode = "STATIC"
        converter.run_convert_to_tfl_passes(module, passes.PassManager(), options)
        return converter.export_flatbuffer_to_bytes(module.operation)


def _with_types(text: str, types: Sequence[str]) -> str:
    """StableHLO with the marks replaced by quantization."""

    def replaced(found: re.Match) -> str:
        result, number, operand, shape = found.groups()
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
    return re.sub(pattern, replaced, text)


def save_litert(path: str | os.PathLike[str], lowered: IntegerModel, inputs: Array | tuple) -> int:
    """Writes a .tflite file, atomically; returns its size in bytes. See `to_litert`."""
    data = to_litert(lowered, inputs)
    files.write_atomic(path, data)
    return len(data)


def litert_model(
    model: str | os.PathLike[str] | bytes, *, threads: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A function of a batch of images that LiteRT computes, one after the other.

    Args:
      model: the file, or what is in it.
      threads: how many; None is LiteRT's own default.

    Raises:
      ImportError: ai-edge-litert is not installed; says how to.
    """
    (runtime,) = extras.load("litert", "ai_edge_litert.interpreter")
    content = {"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)}
    interpreter = runtime.Interpreter(**content, num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: np.ndarray) -> np.ndarray:
        outputs = []
        for image in np.asarray(images):
            interpreter.set_tensor(given["index"], _coded(image[None], given))
            interpreter.invoke()
            outputs.append(_decoded(interpreter.get_tensor(output["index"]), output))
        return np.concatenate(outputs)

    return run


def _coded(x: np.ndarray, detail: dict) -> np.ndarray:
    """As the file takes its input, which may be codes."""
    if detail["dtype"] == np.float32:
        return x.astype(np.float32)
    scale, zero = detail["quantization"]
    return np.clip(np.round(x / np.float32(scale)) + zero, -128, 127).astype(detail["dtype"])


def _decoded(y: np.ndarray, detail: dict) -> np.ndarray:
    if detail["dtype"] == np.float32:
        return y.copy()
    scale, zero = detail["quantization"]
    return ((y.astype(np.float32) - zero) * np.float32(scale)).astype(np.float32)
