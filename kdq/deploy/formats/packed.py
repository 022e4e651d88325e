"""The packed file: a model in one safetensors file, sub-byte weights really packed.

Tensors: `PATH/WEIGHT` as packed bytes where the weight is quantized, with its `PATH/WEIGHT:scale`
(and `:zero_point`, where that is not 0) beside it; every other array as it is, see `trees`. The
scales of block formats are bytes, `:scale_e8m0` or `:scale_e4m3`, the second with a float32 of the
tensor in `:scale_tensor`; a reader that knows `:scale` alone finds none and refuses. The metadata
hold one JSON document under "kdq" (see `Header`), with a checksum of it and of the tensors.

Reading never runs what is in the file, imports nothing, and allocates no more than its arrays are,
unpacked.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import models, quantize, trust
from kdq.deploy.formats import container, fitting, trees
from kdq.deploy.formats.packed_layers import (
    Layer,
    input_quantizer,
    pack_weight,
    quantizer_json,
    unpack_weight,
)
from kdq.deploy.lower.lower import lower
from kdq.deploy.lower.model import IntegerModel
from kdq.fields import Mistake, build
from kdq.quantize import grid
from kdq.quantize.inputs import Batch, as_inputs
from kdq.quantize.kinds import WEIGHT_NAMES
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.paths import keys_of_layer
from kdq.types import Array, QParams, Variables

FORMAT_VERSION = 4
# Version 3 had no `tree` and `inputs`, names without encoding, scalars as arrays of one element,
# and weights in float32 alone.
READABLE = (3, FORMAT_VERSION)


class PackedFileError(Mistake, ValueError):
    """A file that is no packed model, or one that does not fit together."""


class ModelNotImportedError(PackedFileError):
    """A packed file of a model whose class this program has not imported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The document of a packed file."""

    format: int
    model: Mapping[str, Any]  # the module's name and fields
    layers: Mapping[str, Layer]  # the quantized ones, by path
    metadata: Mapping[str, Any]
    tree: trees.Structure = dataclasses.field(default_factory=trees.Structure)
    inputs: tuple[fitting.Input, ...] = ()  # that the model takes; (): not stated


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class PackedModel:
    """A model loaded from a packed file.

    If the file does not state the inputs of the model, the first call compares its arrays with the
    model's, and raises PackedFileError if they do not fit.
    """

    network: Network
    variables: Variables  # quantized weights already as the numbers their codes stand for
    qparams: QParams  # the quantizers of the layers' inputs
    weight_quantizers: QParams  # those that made the codes: what `variables` are on the grids of
    metadata: Mapping[str, Any]  # what was given to `save_packed`
    inputs: tuple[jax.ShapeDtypeStruct, ...] = ()  # that the model takes, if the file states them
    path: str = ""  # of the file
    _fits: list[bool] = dataclasses.field(default_factory=list, compare=False)  # once compared

    def __call__(self, inputs: Batch) -> Array:
        """Returns the outputs in evaluation mode, [batch, classes] for kdq's own models."""
        self.check(inputs)
        return quantize.predict(self.network, self.variables, self.qparams, inputs)

    def lower(self, inputs: Batch, *, fixed_point: bool = False) -> IntegerModel:
        """Returns the integer model; see `lower`. Only the shapes of inputs matter."""
        self.check(inputs)
        paths = {*self.qparams, *self.weight_quantizers}
        qparams = {
            path: {**self.weight_quantizers.get(path, {}), **self.qparams.get(path, {})}
            for path in paths
        }
        weights = Weights(variables=nn.meta.unbox(self.variables), qparams=qparams)
        return lower(self.network, weights, inputs, fixed_point=fixed_point)

    def check(self, inputs: Batch) -> None:
        """Compares all arrays with those that the model has for such inputs, once.

        Raises:
          PackedFileError: they do not fit, or the model does not take the inputs.
        """
        if self._fits:
            return
        try:
            fitting.check(self.network, self.variables, self.qparams, inputs)
        except fitting.MisfitError as error:
            raise PackedFileError(f"{self.path} does not fit its model: {error}") from error
        self._fits.append(True)

    def __repr__(self) -> str:
        model, sizes = (
            self.network.module,
            [np.size(leaf) for leaf in jax.tree.leaves(self.variables)],
        )
        values = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
        fields = [
            f"{name}={getattr(value, '__name__', repr(value))[:60]}"
            for name, value in values.items()
            if name not in ("parent", "name")
        ]
        parts = [
            f"{type(model).__name__}({', '.join(fields)})",
            f"{len(sizes)} arrays of {sum(sizes):,} numbers",
        ]
        for name, qparams in (("weights", self.weight_quantizers), ("inputs", self.qparams)):
            bits = [max(map(grid.bits, quantizers.values())) for quantizers in qparams.values()]
            counts = [f"{width} bits in {bits.count(width)}" for width in sorted(set(bits))]
            parts.append(f"{name}: {', '.join(counts) + ' layers' if counts else 'float'}")
        if self.inputs:
            taken = ", ".join(f"{array.dtype}{list(array.shape)}" for array in self.inputs)
            parts.append(f"takes {taken}")
        if self.metadata:
            parts.append(f"metadata: {', '.join(self.metadata)}")
        return f"PackedModel({'; '.join(parts)})"


def save_packed(
    path: str | os.PathLike[str],
    weights: Weights,
    *,
    model: Mapping[str, Any],
    inputs: Batch | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes a model, atomically; returns the size of the file in bytes.

    Args:
      path: where; its folder must exist.
      weights: float variables, and the quantizers, {} for a float model. Weights that have a
        quantizer are rounded and packed, all other arrays are kept as they are, in any dtype. Of
        containers, dicts (a FrozenDict becomes one), lists, tuples and Flax's boxes for partitioned
        arrays are kept.
      model: `{"name": a module of kdq.models, **fields}`, `kdq.models.describe` of your own model,
        or any other description of it; JSON-able.
      inputs: what the model takes, an array or a tuple of them (or ShapeDtypeStructs): their shapes
        and dtypes let `load_packed` compare all arrays with the model's. None leaves that to the
        first call of the loaded model.
      metadata: anything else worth keeping with the model; JSON-able.

    Raises:
      ValueError: what a file can't hold, as a scale that its format does not, a weight that is not
        finite, or an object that is no array; names the layer or the array.
    """
    variables, layers = weights.variables, {}
    arrays, structure = trees.flatten(variables)
    fitting.check_finite(variables)
    for layer, quantizers in quantize.plain(weights.qparams).items():
        layers[layer] = entry = {}
        try:
            if "weights" in quantizers:
                entry["weight"] = _pack(arrays, structure, variables, layer, quantizers["weights"])
            inputs_of = {k: quantizer_json(v) for k, v in quantizers.items() if k != "weights"}
        except ValueError as error:
            raise ValueError(f"layer {layer!r}: {error}") from error
        if inputs_of:
            entry["inputs"] = inputs_of
    document = {
        "format": FORMAT_VERSION,
        "model": dict(model),
        "layers": layers,
        "metadata": dict(metadata or {}),
    }
    if structure:
        document["tree"] = structure
    if inputs is not None:
        document["inputs"] = fitting.describe(as_inputs(inputs).args)
    return container.write(path, document, arrays)


def load_packed(
    path: str | os.PathLike[str],
    network: Network | nn.Module | None = None,
    *,
    allow_models: Sequence[str] = (),
) -> PackedModel:
    """Loads a packed file; its outputs equal the simulated model's.

    Args:
      path: the file.
      network: the module to load into, or a `Network`; None builds it from the name and fields in
        the file, a class of your own only if its module is imported already, or allowed.
      allow_models: modules ("package.module") that may be imported if the file names them.

    Raises:
      FileNotFoundError: no such file.
      ModelNotImportedError: the model's class is not imported; a PackedFileError.
      PackedFileError: not a packed model, a later format, or tensors that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed model at {path}")
    try:
        packed = _load(path, network, allow_models)
    except ModelNotImportedError:
        raise
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise PackedFileError(f"{path} is no packed model: {error}") from error
    if packed.inputs:
        packed.check(packed.inputs)
    return packed


def _load(
    path: Path, network: Network | nn.Module | None, allow_models: Sequence[str]
) -> PackedModel:
    document, arrays = container.read(path)
    version = document["format"]
    if type(version) is not int or version not in READABLE:
        raise PackedFileError(f"format={version!r}; this kdq reads 3 and 4")
    header = build(Header, document, container.KEY)
    encoded = version > 3
    qparams, weight_quantizers = {}, {}
    for layer, entry in header.layers.items():
        try:
            if entry.weight is not None:
                name = _array_name(layer, entry.weight.name, entry.weight.array, encoded)
                arrays[name], quantizer = unpack_weight(arrays, name, entry.weight)
                weight_quantizers[layer] = {"weights": quantizer}
            if entry.inputs:
                qparams[layer] = {k: input_quantizer(k, v) for k, v in entry.inputs.items()}
        except KeyError as error:
            raise PackedFileError(f"layer {layer!r} has no {error}") from error
        except (ValueError, OverflowError) as error:
            raise PackedFileError(f"layer {layer!r}: {error}") from error
    variables = trees.unflatten(arrays, header.tree, encoded=encoded)
    fitting.check_finite(variables)
    inputs = fitting.read(header.inputs)
    if network is None:
        network = _build(path, header.model, allow_models)
    return PackedModel(
        network=as_network(network),
        variables=variables,
        qparams=qparams,
        weight_quantizers=weight_quantizers,
        metadata=document["metadata"],
        inputs=inputs,
        path=str(path),
    )


def _build(path: Path, description: Mapping[str, Any], allow_models: Sequence[str]) -> nn.Module:
    """Returns the model of a file, whose class is imported or may be."""
    name = description.get("name")
    if models.is_own(name) and not models.is_imported(name):
        module, _, class_name = name.partition(":")
        holds = f"{path} holds a model of the class {module}:{class_name}, which"
        give = f"pass the model: load_packed(path, {class_name.rpartition('.')[2]}(...))"
        if module == "__main__":
            raise ModelNotImportedError(
                f"{path} holds a {class_name} that was defined in a script or notebook, where no "
                f"other program can import it: {give}, or define it here under the same name"
            )
        if module in sys.modules:
            raise ModelNotImportedError(f"{holds} is not there: {give}")
        if not trust.is_trusted(module, allow_models):
            raise ModelNotImportedError(
                f"{holds} this program has not imported, and reading a file imports nothing: "
                f'`import {module}` before, or {give}, or allow_models=["{module}"]'
            )
    try:
        return models.build(**description)
    except Exception as error:  # whatever a class of anybody's raises
        raise PackedFileError(f"model: {error}") from error


def _array_name(layer: str, weight: str, array: str, encoded: bool) -> str:
    """Returns the name of a layer's weight among the arrays; layer "" is the model itself."""
    if array:
        return array
    keys = list(filter(None, ("params", *layer.split("/"), weight)))
    return trees.name_of(keys) if encoded else "/".join(keys)


def _pack(
    arrays: dict[str, np.ndarray],
    structure: dict[str, Any],
    variables: Variables,
    layer: str,
    quantizer: Any,
) -> dict[str, Any]:
    """Packs the weight of a layer in place of its array; returns its fields in the header."""
    keys = keys_of_layer(variables["params"], layer)
    node = variables["params"]
    for key in keys or ():
        node = node[key]
    weight = next((name for name in WEIGHT_NAMES if keys is not None and name in node), None)
    if weight is None:
        raise ValueError(f"params have no such layer with one of {WEIGHT_NAMES}")
    name = trees.name_of(("params", *keys, weight))
    structure.get("dtypes", {}).pop(name, None)
    info = pack_weight(arrays, name, nn.meta.unbox(node[weight]), quantizer)
    info["name"] = weight
    if name != _array_name(layer, weight, "", encoded=True):
        info["array"] = name
    return info
