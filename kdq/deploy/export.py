"""Exports: a packed model in the forms that runtimes take, each checked against the simulation."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import files, provenance
from kdq.deploy import extras, interface
from kdq.deploy.formats import litert, stablehlo
from kdq.deploy.formats.onnx import model as onnx_model
from kdq.deploy.formats.packed import PackedModel, load_packed
from kdq.deploy.lower.lowering import IntegerModel, lower
from kdq.deploy.measure import latency, memory, parity
from kdq.fields import Mistake, unknown
from kdq.quantize.inputs import as_inputs

MANIFEST = "manifest.json"
# Of an array of images, or a tuple of arrays if the model takes several, an array or a tuple.
Runtime = Callable[[Any], Any]


class ExportError(Mistake, RuntimeError):
    """A model that a format has no words for; the message says which part.

    `manifest` is that of what was exported nevertheless.
    """

    manifest: dict[str, Any] | None = None


class ParityError(ExportError):
    """A file whose runtime does not do what was simulated; the message says by how much."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A form that a model can be exported in."""

    file: str  # its name
    extra: str  # of kdq, that installs what it needs; "" is none
    packages: tuple[str, ...]  # whose versions decide what is in it and what it does
    save: Callable[[Path, "Source"], dict[str, Any]]  # returns what the manifest shall say of it
    # With as many threads, or one a core; into this module, if the format needs one.
    load: Callable[[Path, int | None, nn.Module | None], Runtime]
    # The "inputs" and "outputs" of a file as its runtime names them; None: as the manifest does.
    signature: Callable[[Path], dict[str, Any]] | None = None
    compare: Callable[["Source"], dict[str, Any]] = lambda source: {}  # layer by layer
    simulates: bool = False  # its runtime is the simulation


@dataclasses.dataclass(frozen=True)
class Source:
    """What is exported."""

    path: Path  # the packed file
    integer: IntegerModel
    images: Any  # to compare on: an array, or a tuple of arrays
    made: Mapping[str, Any]  # of them, what each integer layer takes and makes in JAX
    about: Mapping[str, str]  # texts to keep in a file
    model: nn.Module | None = None  # to load the packed file into


def export(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    formats: Sequence[str],
    images: Any,
    *,
    model: nn.Module | None = None,
    agreement: float = 0.99,
    latency_batches: Sequence[int] = (),
    threads: int | None = None,
) -> dict[str, Any]:
    """Writes a packed model in other formats, and `manifest.json`, which says what they are.

    Each file is loaded in its own runtime and run on `images`. In the manifest: the model's
    "inputs" and "outputs" (see `interface`); for each format its own names for them, its size and
    SHA-256; `argmax_agreement` and `max_logit_difference` with the simulated model;
    for ONNX also `max_code_difference`, of what any integer layer makes, from integer JAX. Of the
    model: how many codes of layers' inputs differ between the simulation and integer JAX, the bytes
    of what is loaded, and the most that are alive at once for one example. Files
    of formats that are not asked for, and their part of the manifest, stay as they are. If they are
    timed, "latency" has the milliseconds for each batch size and how many times faster that is than
    the float model in ONNX Runtime, beside it in the same process; "smaller_than_float" is how many
    times smaller a file is than that model's ONNX file; and the manifest's "recommended" is the
    format that is fastest with the first of the sizes. A format that fails keeps no other from
    being written: "failed" has its reason, and the error comes at the end.

    Args:
      path: the packed file.
      folder: made if need be.
      formats: keys of `FORMATS`.
      images: [examples, ...] held out, as the model takes them; a tuple of arrays if it takes
        several.
      model: the module; None builds it from the packed file.
      agreement: least share of the examples on which a file has the simulation's class.
      latency_batches: batch sizes at which each format is timed.
      threads: of each runtime when it is timed; None is one a core.

    Raises:
      ValueError: a format that there is not, or more threads than cores.
      ImportError: a library that a format needs is not installed; says how to install it.
      ExportError: a format can't hold the model, or (ParityError) a file does not agree; it is not
        there then. All other formats are, and `manifest` of the error is theirs.
      PackedFileError: `path` is no packed model.
    """
    check_formats([*formats, *(["onnx"] if latency_batches else [])])
    cores = latency.cores(threads)
    path, folder = Path(path), Path(folder)
    packed = load_packed(path, model)
    first = jax.tree.map(lambda array: array[:1], images)
    integer = packed.lower(first)
    outputs = parity.simulated(packed, integer, images)
    simulated, made = parity.leaves(outputs), parity.made(integer, images)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = _manifest(folder, digest)
    manifest.pop("recommended", None)  # of the files that there were
    manifest |= {
        "metadata": packed.metadata,
        "in_float": integer.in_float,
        "weight_bytes": memory.weight_bytes(integer),
        "activation_bytes": memory.activation_bytes(integer, first),
        **interface.describe(images, outputs, packed.metadata),
        "examples": len(simulated[0]),
        "simulation": parity.of_integers(parity.simulated_codes(packed, integer, images), made),
        "versions": {"kdq": packages.version("kdq"), "jax": jax.__version__},
    }
    about = {"packed_sha256": digest, "metadata": json.dumps(packed.metadata)}
    source = Source(path, integer, images, made, about, model)
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, ExportError] = {}
    manifest["failed"] = {}
    for name in formats:
        manifest["files"].pop(name, None)
        try:
            manifest["files"][name] = _export_one(name, source, folder, simulated, agreement)
        except ExportError as error:
            failed[name] = error
            manifest["failed"][name] = str(error)
        _write(folder, manifest)
    if latency_batches:
        _add_latencies(packed, folder, manifest["files"], images, latency_batches, cores)
        manifest["recommended"] = _fastest(manifest["files"], str(latency_batches[0]))
        _write(folder, manifest)
    if failed:
        (error, *others) = failed.values()
        if others:
            error = ExportError("; ".join(str(error) for error in failed.values()))
        error.manifest = manifest
        raise error
    return manifest


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    files.write_json(folder / MANIFEST, manifest)


FLOAT = "float in ONNX Runtime"


def _add_latencies(
    packed: PackedModel,
    folder: Path,
    entries: Mapping[str, dict[str, Any]],
    images: Any,
    batches: Sequence[int],
    cores: Sequence[int],
) -> None:
    """Adds to the entry of each file what it is beside the float model in ONNX Runtime."""
    first = jax.tree.map(lambda array: array[:1], images)
    model = lower(packed.model, packed.variables, {}, first, train=False)
    proto = onnx_model.to_onnx(model, first).SerializeToString()
    with latency.pinned(cores):
        runtimes = {FLOAT: _onnx_runtime(proto, len(cores))}
        for name, entry in entries.items():
            runtimes[name] = FORMATS[name].load(folder / entry["file"], len(cores), packed.model)
        timed = latency.measure(runtimes, images, base=FLOAT, batches=batches)
        conditions = latency.conditions(cores)
    for name, entry in entries.items():
        sizes = {str(size): dataclasses.asdict(timing) for size, timing in timed[name].items()}
        entry["latency"] = {"conditions": conditions, **sizes}
        entry["smaller_than_float"] = len(proto) / entry["size_bytes"]


def _fastest(entries: Mapping[str, Any], size: str) -> str | None:
    """The format, other than the simulation."""
    ratios = {
        k: e["latency"][size]["ratio"] for k, e in entries.items() if not FORMATS[k].simulates
    }
    return max(ratios, key=ratios.__getitem__, default=None)


def check_formats(formats: Sequence[str]) -> None:
    """Raises what `export` raises for formats that there are not, or that need a library."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(unknown("export format", name, FORMATS))
        if FORMATS[name].extra:
            modules = [package.replace("-", "_") for package in FORMATS[name].packages]
            extras.load(FORMATS[name].extra, *modules)


def _manifest(folder: Path, digest: str) -> dict[str, Any]:
    """What is there of the same packed file."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        found = files.read_json(folder / MANIFEST)
        if found["packed_sha256"] == digest:
            there = {k: e for k, e in found["files"].items() if (folder / e["file"]).is_file()}
            return {**found, "files": there}
    return {"packed_sha256": digest, "files": {}}


def _export_one(
    name: str, source: Source, folder: Path, simulated: list[np.ndarray], agreement: float
) -> dict[str, Any]:
    one = FORMATS[name]
    target = folder / one.file
    with _new_file(target) as temporary:
        try:
            details = one.save(temporary, source)
            run = one.load(temporary, None, source.model)
        except ValueError as error:
            raise ExportError(f"format {name!r}: {error}") from error
        outputs = parity.leaves(run(source.images))
        found = parity.of_all(outputs, simulated) | one.compare(source)
        if one.signature is not None:
            details |= one.signature(temporary)
        if not found["argmax_agreement"] >= agreement:
            raise ParityError(
                f"{target}: its runtime has the class of the simulated model on "
                f"{found['argmax_agreement']:.2%} of {len(outputs[0])} examples, want "
                f"{agreement:.2%} (largest difference of outputs "
                f"{found['max_logit_difference']:.3g})"
            )
    data = target.read_bytes()
    return {
        "file": one.file,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **details,
        **found,
        "commit": provenance.commit(),
        "versions": {package: packages.version(package) for package in one.packages},
    }


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """A path beside `target` that becomes it; nothing is left of it after an error."""
    temporary = target.with_name(f".new-{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# One save and one load for each format.


def _copy_packed(path: Path, source: Source) -> dict[str, Any]:
    shutil.copyfile(source.path, path)
    return {}


def _load_packed(path: Path, threads: int | None, model: nn.Module | None) -> Runtime:
    packed = load_packed(path, model)
    return lambda images: _plain(packed(images))


def _plain(outputs: Any) -> Any:
    """An array, or a tuple of arrays."""
    arrays = parity.leaves(outputs)
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


def _save_onnx(path: Path, source: Source) -> dict[str, Any]:
    onnx_model.save_onnx(path, source.integer, source.images, metadata=source.about)
    return {"opset": onnx_model.opset(source.integer)}


def _save_symmetric(path: Path, source: Source) -> dict[str, Any]:
    onnx_model.save_onnx(path, source.integer, source.images, symmetric=True, metadata=source.about)
    return {"opset": onnx_model.opset(source.integer)}


def _load_onnx(path: Path, threads: int | None, model: nn.Module | None) -> Runtime:
    return _onnx_runtime(path, threads)


def _load_symmetric(path: Path, threads: int | None, model: nn.Module | None) -> Runtime:
    return _onnx_runtime(path, threads, integer=False)


def _onnx_runtime(path: Path | bytes, threads: int | None, integer: bool = True) -> Runtime:
    session = onnx_model.onnx_session(path, threads=threads, integer=integer)
    names = [taken.name for taken in session.get_inputs()]

    def run(images: Any) -> Any:
        arrays = map(np.asarray, as_inputs(images).args)
        return _plain(session.run(None, dict(zip(names, arrays, strict=True))))

    return run


def _compare_onnx(source: Source) -> dict[str, Any]:
    """What each integer layer makes in ONNX Runtime and in JAX."""
    proto = onnx_model.to_onnx(source.integer, source.images, each_layer=True)
    names = onnx_model.layer_names(source.integer, source.images)
    run = _onnx_runtime(proto.SerializeToString(), None)
    outputs = parity.leaves(run(source.images))[-len(names) :] if names else []
    theirs = dict(zip(names, outputs, strict=True))
    return parity.of_integers(source.made, theirs)


def _save_stablehlo(path: Path, source: Source) -> dict[str, Any]:
    platforms = ("cpu", "cuda")
    stablehlo.save_stablehlo(
        path, source.integer, source.images, platforms=platforms, metadata=source.about
    )
    return {"platforms": platforms}


def _load_stablehlo(path: Path, threads: int | None, model: nn.Module | None) -> Runtime:
    program = stablehlo.load_stablehlo(path)
    return lambda images: _plain(program(*as_inputs(images).args))


def _save_litert(path: Path, source: Source) -> dict[str, Any]:
    litert.save_litert(path, source.integer, source.images)
    return {}


def _load_litert(path: Path, threads: int | None, model: nn.Module | None) -> Runtime:
    return litert.litert_model(path, threads=threads)


FORMATS = {
    "packed": Format(
        "model.safetensors", "", ("safetensors",), _copy_packed, _load_packed, simulates=True
    ),
    "onnx": Format(
        "model.onnx",
        "onnx",
        ("jax2onnx", "onnx", "onnxruntime"),
        _save_onnx,
        _load_onnx,
        onnx_model.signature,
        _compare_onnx,
    ),
    "onnx_int8": Format(
        "model.int8.onnx",
        "onnx",
        ("jax2onnx", "onnx", "onnxruntime"),
        _save_symmetric,
        _load_symmetric,
        onnx_model.signature,
        simulates=True,  # TensorRT would not
    ),
    "litert": Format(
        "model.tflite",
        "litert",
        ("ai-edge-litert", "litert-converter"),
        _save_litert,
        _load_litert,
        litert.signature,
    ),
    "stablehlo": Format("model.stablehlo", "", ("jax", "jaxlib"), _save_stablehlo, _load_stablehlo),
}
