"""Exports: a packed model in the forms that runtimes take, each checked against the simulation."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import files, provenance, quantize
from kdq.deploy.formats.catalog import FORMATS, Source, check_formats
from kdq.deploy.formats.onnx.model import load_onnx, to_onnx
from kdq.deploy.formats.packed import PackedModel, load_packed
from kdq.deploy.lower.lower import lower
from kdq.deploy.measure import latency, memory, parity
from kdq.fields import Mistake
from kdq.quantize.inputs import Batch, as_inputs
from kdq.quantize.network import Network, Weights
from kdq.tasks import Task

MANIFEST = "manifest.json"
FLOAT = "float in ONNX Runtime"
# How Flax's layers read an array of so many axes.
LAYOUTS = {4: "NHWC", 5: "NDHWC"}


class ExportError(Mistake, RuntimeError):
    """A model that a format has no words for; the message says which part.

    `manifest` is that of what was exported nevertheless.
    """

    manifest: dict[str, Any] | None = None


class ParityError(ExportError):
    """A file whose runtime does not do what was simulated; the message says by how much."""


def export(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    formats: Sequence[str],
    inputs: Batch,
    *,
    network: Network | nn.Module | None = None,
    fixed_point: bool = False,
    task: Task = parity.CLASSIFICATION,
    agreement: float = 0.99,
    latency_batches: Sequence[int] = (),
    threads: int | None = None,
) -> dict[str, Any]:
    """Writes a packed model in other formats, and `manifest.json`, which says what they are.

    Each file is loaded in its own runtime and run on `inputs`. In the manifest: the model's
    "inputs" and "outputs" (see `describe`), and what its "prediction" means; for each format its
    own names for them, its size and SHA-256; `argmax_agreement` and `max_logit_difference` with the
    simulated model, see `parity.compare_outputs`; for ONNX also `max_code_difference`, of what any
    integer layer makes, from integer JAX. Of the model: how many codes of layers' inputs differ
    between the simulation and integer JAX, the bytes of what is loaded, and the most that are alive
    at once for one example. Files of formats that are not asked for, and their part of the
    manifest, stay as they are. If they are timed, "latency" has the milliseconds for each batch
    size and how many times faster that is than the float model in ONNX Runtime, beside it in the
    same process; "smaller_than_float" is how many times smaller a file is than that model's ONNX
    file; and the manifest's "recommended" is the format that is fastest with the first of the
    sizes. A format that fails keeps no other from being written: "failed" has its reason, and the
    error comes at the end.

    Args:
      path: the packed file.
      folder: made if need be.
      formats: keys of `FORMATS`.
      inputs: held-out examples as the model takes them: arrays with a leading axis of examples.
      network: the module, or a `Network`; None builds it from the packed file.
      fixed_point: no float multiplies sums; see `lower`. ONNX has no form for that, LiteRT does
        so in any case.
      task: what outputs mean: of which the agreement is, and what the manifest says.
      agreement: the least of a file with the simulation: the share of the examples that have its
        class; see `parity.compare_outputs`.
      latency_batches: batch sizes at which each format is timed.
      threads: of each runtime when it is timed; None is one a core.

    Raises:
      ValueError: an unknown format, or more threads than cores.
      ImportError: a library that a format needs is not installed; says how to install it.
      ExportError: a format can't hold the model, or (ParityError) a file does not agree; it is not
        there then. All other formats are, and `manifest` of the error is theirs.
      PackedFileError: `path` is no packed model.
    """
    check_formats([*formats, *(["onnx"] if latency_batches else [])])
    cores = latency.cores(threads)
    path, folder = Path(path), Path(folder)
    packed = load_packed(path, network)
    first = jax.tree.map(lambda array: array[:1], inputs)
    integer = packed.lower(first, fixed_point=fixed_point)
    # Of the simulation, with the biases of the integer model, whatever the file's are.
    variables = integer.simulated(packed.variables)
    outputs = quantize.predict(packed.network, variables, packed.qparams, inputs)
    simulated, integers = parity.leaves(outputs), parity.layer_integers(integer, inputs)
    codes = parity.simulated_codes(packed, integer, inputs)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = {
        "packed_sha256": digest,
        "files": _files_of(folder, digest, fixed_point),
        "fixed_point": fixed_point,
        "metadata": packed.metadata,
        "in_float": integer.in_float,
        "weight_bytes": memory.weight_bytes(integer),
        "activation_bytes": memory.activation_bytes(integer, first),
        **describe(inputs, outputs, packed.metadata),
        "prediction": {"task": task.name, **task.describe_outputs()},
        "examples": len(simulated[0]),
        "simulation": parity.compare_integers(codes, integers),
        "versions": {"kdq": packages.version("kdq"), "jax": jax.__version__},
        "failed": {},
    }
    about = {"packed_sha256": digest, "metadata": json.dumps(packed.metadata)}
    source = Source(path, integer, inputs, integers, about, network)
    folder.mkdir(parents=True, exist_ok=True)
    errors: list[ExportError] = []
    for name in formats:
        manifest["files"].pop(name, None)
        try:
            manifest["files"][name] = _export_format(
                name, source, folder, simulated, task=task, agreement=agreement
            )
        except ExportError as error:
            errors.append(error)
            manifest["failed"][name] = str(error)
        files.write_json(folder / MANIFEST, manifest)
    if latency_batches:
        _add_latencies(packed, folder, manifest, inputs, latency_batches, cores)
        files.write_json(folder / MANIFEST, manifest)
    if errors:
        several = len(errors) > 1
        error = ExportError("; ".join(map(str, errors))) if several else errors[0]
        error.manifest = manifest
        raise error
    return manifest


def describe(inputs: Batch, outputs: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the "inputs" and "outputs" of a model, in the order in which a runtime has them.

    Each has a shape, whose first axis is "batch", and a dtype; images their layout, and what they
    were normalized by, `(pixel - mean) / std`, if the metadata of the packed file have it; an
    output its place in what the model returns, if that is no single array.
    """
    entry = lambda array: {
        "shape": ["batch", *np.shape(array)[1:]],
        "dtype": np.dtype(array.dtype).name,
    }
    data = metadata.get("data")
    normalization = isinstance(data, Mapping) and {k: data[k] for k in ("mean", "std") if k in data}
    input_entries = [entry(array) for array in jax.tree.leaves(as_inputs(inputs))]
    for described in input_entries:
        rank = len(described["shape"])
        if described["dtype"].startswith("float") and rank in LAYOUTS:
            described["layout"] = LAYOUTS[rank]
            if normalization:
                described["normalization"] = normalization
    output_entries = [
        entry(array) | ({"place": jax.tree_util.keystr(path)} if path else {})
        for path, array in jax.tree_util.tree_leaves_with_path(outputs)
    ]
    return {"inputs": input_entries, "outputs": output_entries}


def _add_latencies(
    packed: PackedModel,
    folder: Path,
    manifest: dict[str, Any],
    inputs: Batch,
    batches: Sequence[int],
    cores: Sequence[int],
) -> None:
    """Adds to the entry of each file how it compares with the float model in ONNX Runtime, and to
    the manifest which format, other than the simulation, is the fastest."""
    entries = manifest["files"]
    first = jax.tree.map(lambda array: array[:1], inputs)
    weights = Weights(variables=packed.variables, qparams={})
    in_float = lower(packed.network, weights, first)
    proto = to_onnx(in_float, first).SerializeToString()
    with latency.pinned(cores):
        runtimes = {FLOAT: load_onnx(proto, threads=len(cores))}
        for name, entry in entries.items():
            runtimes[name] = FORMATS[name].load(folder / entry["file"], len(cores), packed.network)
        timed = latency.measure(runtimes, inputs, base=FLOAT, batches=batches)
        conditions = latency.conditions(cores)
    for name, entry in entries.items():
        sizes = {str(size): dataclasses.asdict(timing) for size, timing in timed[name].items()}
        entry["latency"] = {"conditions": conditions, **sizes}
        entry["smaller_than_float"] = len(proto) / entry["size_bytes"]
    ratios = {name: entry["latency"][str(batches[0])]["ratio"] for name, entry in entries.items()}
    candidates = [name for name in ratios if not FORMATS[name].simulates]
    manifest["recommended"] = max(candidates, key=ratios.__getitem__, default=None)


def _files_of(folder: Path, digest: str, fixed_point: bool) -> dict[str, Any]:
    """Returns the manifest's entries of files that are there, of the same integer model."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        manifest = files.read_json(folder / MANIFEST)
        arithmetic = manifest.get("fixed_point", False)
        if manifest["packed_sha256"] == digest and arithmetic == fixed_point:
            entries = manifest["files"].items()
            return {name: entry for name, entry in entries if (folder / entry["file"]).is_file()}
    return {}


def _export_format(
    name: str,
    source: Source,
    folder: Path,
    simulated: list[np.ndarray],
    *,
    task: Task,
    agreement: float,
) -> dict[str, Any]:
    """Writes and checks one file; returns its entry in the manifest."""
    form = FORMATS[name]
    target = folder / form.file
    temporary = target.with_name(f".new-{target.name}")
    try:
        try:
            details = form.save(temporary, source)
            runtime = form.load(temporary, None, source.network)
        except ValueError as error:
            raise ExportError(f"format {name!r}: {error}") from error
        outputs = parity.leaves(runtime(source.inputs))
        measures = parity.compare_all(outputs, simulated, task)
        if form.layer_integers is not None:
            measures |= parity.compare_integers(source.integers, form.layer_integers(source))
        if not measures["argmax_agreement"] >= agreement:
            raise ParityError(
                f"{target}: its runtime agrees with the simulated model on "
                f"{measures['argmax_agreement']:.2%} of {len(outputs[0])} examples, expected "
                f"{agreement:.2%} (largest difference of outputs "
                f"{measures['max_logit_difference']:.3g})"
            )
        os.replace(temporary, target)
    finally:  # nothing is left of it after an error
        temporary.unlink(missing_ok=True)
    data = target.read_bytes()
    return {
        "file": form.file,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **({"fixed_point": True} if source.integer.static.fixed_point else {}),
        **details,
        **(runtime.signature or {}),
        **measures,
        "commit": provenance.commit(),
        "versions": {package: packages.version(package) for package in form.packages},
    }
