"""ONNX: an integer model as a file that ONNX Runtime executes with the same integers."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from kdq import files
from kdq.deploy import extras
from kdq.deploy.flow.layer import layer_p
from kdq.deploy.formats import rounded
from kdq.deploy.formats.onnx import program as onnx_program
from kdq.deploy.formats.runtime import Runtime, any_batch, example_specs
from kdq.deploy.lower.model import IntegerModel
from kdq.quantize.inputs import Batch, Inputs
from kdq.types import Array

INPUT, OUTPUT = "input", "output"
OPSET, OPSET_INT2 = 21, 25  # the first with int4, and with int2
INT8 = 3  # of ONNX's data types
DTYPES = {"tensor(float)": "float32"}  # that ONNX Runtime names otherwise
DTYPES |= {f"tensor({kind})": kind for kind in ("int8", "uint8", "int32", "int64", "bool")}


def to_onnx(
    lowered: IntegerModel,
    inputs: Batch,
    *,
    each_layer: bool = False,
    symmetric: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """Returns the model as an `onnx.ModelProto`, for batches of any size.

    Its inputs are `input` (`input_1`, ...), its outputs `output` (`output_1`, ...).

    Args:
      lowered: see `lower`.
      inputs: of one batch, arrays with a leading batch axis; only the shapes matter.
      each_layer: further outputs, int32, with what each integer layer takes and makes; see
        `layer_names`.
      symmetric: for TensorRT and its like: layers multiply floats behind pairs of QuantizeLinear
        and DequantizeLinear of int8 around 0, which such a runtime makes integer kernels of. Inputs
        of 8 bits must be signed; weights have 8 bits in the file.
      metadata: texts to keep in the file.

    Raises:
      ImportError: jax2onnx is not installed; says how to.
      ValueError: an integer layer is inside `nn.vmap`, or in a loop that is no scan; the model
        multiplies by fixed-point numbers; it has inputs that are not symmetric; or an operation
        that there is no form for, which is named.
    """
    if lowered.static.fixed_point:
        raise ValueError("ONNX has multipliers of sums in float32: lower without fixed_point")
    if symmetric and each_layer:
        raise ValueError("each_layer: a symmetric model has no integers between its layers")
    program, _ = _trace(lowered, inputs, each_layer, symmetric)
    specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    number = lambda base, count: [f"{base}_{i}" if i else base for i in range(count)]
    proto = convert(
        program,
        opset=opset(lowered),
        input_names=number(INPUT, len(specs)),
        output_names=number(OUTPUT, len(program.jaxpr.outvars)),
    )
    _compact(proto.graph)
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    return proto


CONVERTERS = [f"kdq.deploy.formats.onnx.{name}" for name in ("nodes", "products", "windows")]


def convert(program: core.ClosedJaxpr, **options: Any) -> Any:
    """Returns a program as an `onnx.ModelProto`, by jax2onnx and the converters of this folder.

    `options` are those of `jax2onnx.to_onnx`. Raises ImportError if that is not installed,
    ValueError for a part of the program that has no form in ONNX.
    """
    jax2onnx, *_ = extras.load("onnx", "jax2onnx", *CONVERTERS)

    def write(function: Callable[..., Any], avals: Sequence[Any], **names: Any) -> Any:
        inputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        return jax2onnx.to_onnx(function, inputs=inputs, model_name="kdq", **names, **options)

    names = {key: options.pop(key) for key in ("input_names", "output_names") if key in options}
    with _contained():
        try:
            run = lambda *arrays: onnx_program.evaluate(program, arrays)
            return write(run, program.in_avals, **names)
        except onnx_program.NoForm:
            raise
        except Exception as error:  # it has no exception of its own
            raise ValueError(_refusal(program, error, write)) from error


def _refusal(program: core.ClosedJaxpr, error: Exception, write: Callable[..., Any]) -> str:
    """Says in a line why jax2onnx did not write a program, and which equation it stops at."""
    first_line = lambda error: (str(error).strip() or type(error).__name__).splitlines()[0]
    for eqn in program.jaxpr.eqns:
        atoms = [atom for atom in eqn.invars if isinstance(atom, core.Var)]
        if eqn.primitive.name.startswith("kdq_") or not atoms:
            continue

        def run_alone(*arrays: Any, eqn=eqn, atoms=atoms) -> Any:
            known = dict(zip(atoms, arrays, strict=True))
            value = lambda atom: atom.val if isinstance(atom, core.Literal) else known[atom]
            return onnx_program.bind(eqn, [value(atom) for atom in eqn.invars])

        try:
            write(run_alone, [atom.aval for atom in atoms])
        except Exception as reason:  # any: it is said, and nothing is swallowed
            return f"jax2onnx has no form for {eqn.primitive.name!r}: {first_line(reason)}"
    return f"jax2onnx: {first_line(error)}"


def _compact(graph: Any) -> None:
    """Leaves out what a runtime infers: shapes, names, a second copy of a constant."""
    del graph.value_info[:]
    first: dict[bytes, str] = {}
    same, kept = {}, []
    for constant in graph.initializer:
        name = constant.name
        constant.name = ""
        # int8 constants have no second use: session.x64quantprecision rewrites each for its own.
        is_int8 = constant.data_type == INT8
        same[name] = name if is_int8 else first.setdefault(constant.SerializeToString(), name)
        constant.name = name
        if same[name] == name:
            kept.append(constant)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        node.ClearField("name")
        node.input[:] = [same.get(name, name) for name in node.input]


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Undoes what jax2onnx does beside its work.

    It leaves the type of some values to be inferred, with a warning for each; and replaces JAX's
    jnp.cumsum by its own, which does less.
    """
    cumsum, logger = jnp.cumsum, logging.getLogger("onnx_ir.serde")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        jnp.cumsum = cumsum


def layer_names(lowered: IntegerModel, inputs: Batch) -> list[str]:
    """Returns the names, as in `integers` of `IntegerModel.apply`, of the outputs that `each_layer`
    of `to_onnx` adds, in their order."""
    return _trace(lowered, inputs, each_layer=True)[1]


def _trace(
    lowered: IntegerModel, inputs: Batch, each_layer: bool = False, symmetric: bool = False
) -> tuple[core.ClosedJaxpr, list[str]]:
    """Traces a model with a batch of any size; returns the program and the names of its layers."""
    names: list[str] = []

    def forward(call: Inputs) -> Any:
        if symmetric:
            return rounded.run(lowered, onnx_program.Symmetric(), call)
        integers: dict[str, Array] = {}
        outputs = lowered.apply(call, unroll=True, integers=integers)
        names.extend(integers)
        if not each_layer:
            return outputs
        # Added to, as jax2onnx loses outputs that are transposed back for the next layer.
        return outputs, [array.astype(jnp.int32) + 0 for array in integers.values()]

    program = jax.make_jaxpr(forward)(example_specs(inputs, any_batch()))
    if symmetric:
        return program, names
    for eqn in program.jaxpr.eqns:
        of_codes = any(atom.aval.dtype == jnp.int8 for atom in eqn.invars)
        multiplies = eqn.primitive.name in ("dot_general", "conv_general_dilated")
        if eqn.primitive is layer_p or (of_codes and multiplies):
            raise ValueError(
                "an integer layer inside nn.vmap, or a loop that is no scan, has no form in ONNX: "
                "leave it in float"
            )
    return program, names


def opset(lowered: IntegerModel) -> int:
    """Returns the version of the operators that a model's file needs."""
    of_2_bits = any(leaf.dtype == jnp.int2 for leaf in jax.tree.leaves(lowered))
    return OPSET_INT2 if of_2_bits else OPSET


def save_onnx(
    path: str | os.PathLike[str],
    lowered: IntegerModel,
    inputs: Batch,
    *,
    symmetric: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes an ONNX file, atomically; returns its size in bytes. See `to_onnx`."""
    data = to_onnx(lowered, inputs, symmetric=symmetric, metadata=metadata).SerializeToString()
    files.write_atomic(path, data)
    return len(data)


def load_onnx(
    model: str | os.PathLike[str] | bytes, *, threads: int | None = None, integer: bool = True
) -> Runtime:
    """Loads a file into ONNX Runtime; arguments of `onnx_session`."""
    session = onnx_session(model, threads=threads, integer=integer)
    describe = lambda value: {
        "name": value.name,
        "shape": list(value.shape),
        "dtype": DTYPES.get(value.type, value.type),
    }
    inputs, outputs = session.get_inputs(), session.get_outputs()
    signature = {"inputs": [*map(describe, inputs)], "outputs": [*map(describe, outputs)]}
    names = [entry["name"] for entry in signature["inputs"]]
    run = lambda call: session.run(None, dict(zip(names, jax.tree.leaves(call), strict=True)))
    return Runtime(run, signature)


def onnx_session(
    model: str | os.PathLike[str] | bytes,
    *,
    threads: int | None = None,
    exact: bool = True,
    round_floats: bool = True,
    integer: bool = True,
) -> Any:
    """Returns an `onnxruntime.InferenceSession` on the CPU.

    Args:
      model: the file, or what is in it.
      threads: how many; None is one a core.
      exact: sums of uint8 with int8 products as the standard has them. Without it a CPU that has
        no instruction for these (VNNI) saturates pairs of products at 16 bits.
      round_floats: where weights alone are quantized, round what they are multiplied with to 8
        bits, in blocks with a scale of their own, as ONNX Runtime does by default. Without it
        floats stay floats, as simulated: slower, and very slow unless weights have 4 bits.
      integer: make integer kernels of pairs of QuantizeLinear and DequantizeLinear and of what is
        between them. Without it they are computed as they are written, which a `symmetric` model
        is to be checked with: ONNX Runtime 1.32 fails to make kernels of some.

    Raises:
      ImportError: onnxruntime is not installed; says how to.
      FileNotFoundError: no such file.
    """
    (onnxruntime,) = extras.load("onnx", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not integer:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not round_floats:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not isinstance(model, bytes):
        path = Path(model)
        if not path.is_file():
            raise FileNotFoundError(f"no ONNX model at {path}")
        model = str(path)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
