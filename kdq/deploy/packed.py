"""The packed file: a model in one safetensors file, sub-byte weights really packed.

Tensors: `PATH/WEIGHT` as packed bytes where the weight is quantized, with its `PATH/WEIGHT:scale`
(and `:zero_point`, where that is not 0) beside it; every other array as it is. The scales of block
formats are bytes, `:scale_e8m0` or `:scale_e4m3`, the second with a float32 of the tensor in
`:scale_tensor`; a reader that knows `:scale` alone finds none and refuses. The metadata hold
one JSON document under "kdq" (format version, the model's name and fields, and for each quantized
layer the bits, shapes and the quantizer of its input).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from kdq import files, models, quantize
from kdq.deploy.packing import pack, unpack
from kdq.quantize import grid, scale_formats
from kdq.quantize.kinds import WEIGHT_NAMES
from kdq.types import Array, QParams, Variables

FORMAT_VERSION = 2


class PackedFileError(ValueError):
    """A file that is no packed model, or one that does not fit together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A model loaded from a packed file."""

    model: nn.Module
    variables: Variables  # quantized weights already as the numbers their codes stand for
    qparams: QParams  # the quantizers of the layers' inputs
    metadata: Mapping[str, Any]  # what was given to `save_packed`

    def __call__(self, inputs: Array) -> Array:
        """The outputs in evaluation mode, [batch, classes] for our models."""
        return quantize.predict(self.model, self.variables, self.qparams, inputs)


def save_packed(
    path: str | os.PathLike[str],
    variables: Variables,
    qparams: QParams,
    *,
    model: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes a model, atomically; returns the size of the file in bytes.

    Args:
      path: where; its folder must exist.
      variables: float variables. Weights that `qparams` quantizes are rounded and packed, all
        other arrays are kept as they are.
      qparams: the quantizers; {} for a float model.
      model: `{"name": a module of kdq.models, **fields}`, or any description of your own model;
        JSON-able.
      metadata: anything else worth keeping with the model; JSON-able.

    Raises:
      ValueError: a scale that its format does not hold; names the layer.
    """
    arrays = traverse_util.flatten_dict(_numpy(variables), sep="/")
    layers = {}
    for layer, quantizers in quantize.plain(qparams).items():
        layers[layer] = entry = {}
        if "weights" in quantizers:
            names = (_weight_path(layer, name) for name in WEIGHT_NAMES)
            name = next(name for name in names if name in arrays)
            try:
                entry["weight"] = _pack_weight(arrays, name, quantizers["weights"])
            except ValueError as error:
                raise ValueError(f"layer {layer!r}: {error}") from error
        inputs = {k: _quantizer_json(v) for k, v in quantizers.items() if k != "weights"}
        if inputs:
            entry["inputs"] = inputs
    document = {
        "format": FORMAT_VERSION,
        "model": dict(model),
        "layers": layers,
        "metadata": dict(metadata or {}),
    }
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    data = safetensors.numpy.save(arrays, metadata={"kdq": text})
    files.write_atomic(path, data)
    return len(data)


def load_packed(path: str | os.PathLike[str], model: nn.Module | None = None) -> PackedModel:
    """Loads a packed file; its outputs equal the simulated model's.

    Args:
      path: the file.
      model: the module to load into; None builds it from the name and fields in the file.

    Raises:
      FileNotFoundError: no such file.
      PackedFileError: not a packed model, a later format, or tensors that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed model at {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("kdq")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise PackedFileError(f"{path} is no packed model: {error}") from error
    if text is None:
        raise PackedFileError(f"{path} is no packed model: its metadata have no 'kdq' entry")
    document = _parse(text, path)
    if document["format"] != FORMAT_VERSION:
        raise PackedFileError(
            f"{path} has format {document['format']}; this kdq reads {FORMAT_VERSION}"
        )
    qparams = {}
    for layer, entry in document["layers"].items():
        if "weight" in entry:
            info = entry["weight"]
            name = _weight_path(layer, info["name"])
            try:
                arrays[name] = _unpack_weight(arrays, name, info)
            except KeyError as error:
                raise PackedFileError(f"{path}: layer {layer!r} has no {error}") from error
            except ValueError as error:
                raise PackedFileError(f"{path}: layer {layer!r}: {error}") from error
        if "inputs" in entry:
            qparams[layer] = {k: _quantizer(v) for k, v in entry["inputs"].items()}
    if model is None:
        model = models.build(**document["model"])
    return PackedModel(
        model=model,
        variables=jax.device_put(traverse_util.unflatten_dict(arrays, sep="/")),
        qparams=qparams,
        metadata=document["metadata"],
    )


def _parse(text: str, path: Path) -> dict[str, Any]:
    """The document under "kdq"."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise PackedFileError(f"{path} is no packed model: its 'kdq' entry: {error}") from error
    if not isinstance(document, dict) or "format" not in document:
        raise PackedFileError(f"{path} is no packed model: its 'kdq' entry has no format")
    return document


def _weight_path(layer: str, weight: str) -> str:
    """The name of a layer's weight; layer "" is the model itself."""
    return "/".join(filter(None, ("params", layer, weight)))


def _pack_weight(arrays: dict[str, np.ndarray], name: str, quantizer: grid.Quantizer) -> dict:
    """Replaces a weight by its packed codes and scales; returns what is needed to undo that."""
    weight, bits = arrays[name], grid.bits(quantizer)
    scale_format = quantizer.scale_format
    quantizer, stored = _pack_scale(weight, quantizer)
    codes = np.asarray(grid.over_stack(grid.to_codes, quantizer)(weight, quantizer))
    qmin = np.asarray(quantizer.qmin)
    codes = codes - _beside(qmin, codes)
    arrays[name] = pack(codes.astype(np.uint8), bits)
    arrays.update({f"{name}:{suffix}": array for suffix, array in stored.items()})
    zero_point = np.asarray(quantizer.zero_point)
    constant = float(zero_point.flat[0]) if np.ptp(zero_point) == 0 else None
    if constant is None:
        arrays[f"{name}:zero_point"] = zero_point
    info = {
        "name": name.rsplit("/", 1)[1],
        "shape": weight.shape,
        "bits": bits,
        "qmin": _json(qmin),
        "zero_point": None if constant is None else _json(constant),
    }
    if quantizer.levels is not None:
        info["levels"] = _json(quantizer.levels)
    if scale_format in scale_formats.STORED:
        info["scale_format"] = scale_format
    return info


def _pack_scale(
    weight: np.ndarray, quantizer: grid.Quantizer
) -> tuple[grid.Quantizer, dict[str, np.ndarray]]:
    """The quantizer with the scale that its format holds, and the arrays of it by their suffix."""
    name = quantizer.scale_format
    if not name:
        return quantizer, {"scale": np.asarray(quantizer.scale)}
    of_layer = lambda _, q: (grid.with_rounded_scale(q).scale, scale_formats.of_tensor(q.scale))
    scale, shared = map(np.asarray, grid.over_stack(of_layer, quantizer)(weight, quantizer))
    quantizer = quantizer.replace(scale=scale, scale_format="")
    if name not in scale_formats.STORED:
        return quantizer, {"scale": scale}
    if not scale_formats.STORED[name].shared:
        return quantizer, {f"scale_{name}": scale_formats.encode(scale, np.float32(1), name)}
    codes = scale_formats.encode(scale, _beside(shared, scale), name)
    return quantizer, {f"scale_{name}": codes, "scale_tensor": shared}


def _unpack_scale(
    arrays: dict[str, np.ndarray], name: str, scale_format: str, stack: tuple[int, ...]
) -> np.ndarray:
    if not scale_format:
        return arrays.pop(f"{name}:scale")
    if scale_format not in scale_formats.STORED:
        raise ValueError(f"{scale_format=}: want one of {tuple(scale_formats.STORED)}")
    codes, shared = arrays.pop(f"{name}:scale_{scale_format}"), np.float32(1)
    if scale_formats.STORED[scale_format].shared:
        shared = arrays.pop(f"{name}:scale_tensor")
        if (shared.dtype, shared.shape) != (np.float32, stack):
            raise ValueError(f"scale_tensor: want float32 {stack}: {shared.dtype} {shared.shape}")
    return scale_formats.decode(codes, _beside(shared, codes), scale_format)


def _beside(of_stack: np.ndarray, array: np.ndarray) -> np.ndarray:
    """What each layer of a stack has one of, so that it broadcasts with an array of the stack."""
    of_stack = np.asarray(of_stack)
    return of_stack.reshape(*of_stack.shape, *[1] * (array.ndim - of_stack.ndim))


def _unpack_weight(arrays: dict[str, np.ndarray], name: str, info: Mapping[str, Any]) -> np.ndarray:
    shape = tuple(info["shape"])
    codes = unpack(arrays.pop(name), info["bits"], int(np.prod(shape))).reshape(shape)
    qmin = np.asarray(info["qmin"], np.float32)
    scale = _unpack_scale(arrays, name, info.get("scale_format", ""), qmin.shape)
    if scale.ndim > len(shape) or any(
        full % size for size, full in zip(scale.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(f"a scale of shape {scale.shape} for a weight of shape {shape}")
    zero_point = info["zero_point"]
    if zero_point is None:
        zero_point = arrays.pop(f"{name}:zero_point")
    quantizer = grid.Quantizer(
        scale=scale,
        zero_point=np.broadcast_to(np.float32(zero_point), scale.shape),
        qmin=qmin,
        qmax=qmin,  # what is decoded is not clipped
        levels=jnp.asarray(info["levels"], jnp.float32) if "levels" in info else None,
    )
    codes = codes + _beside(qmin, codes)
    return np.asarray(grid.over_stack(grid.from_codes, quantizer)(codes, quantizer))


def _quantizer_json(quantizer: grid.Quantizer) -> dict[str, Any]:
    """The quantizer of an input; what it trains by is not part of a finished model."""
    document = {k: _json(getattr(quantizer, k)) for k in ("scale", "zero_point", "qmin", "qmax")}
    if quantizer.levels is not None:
        document["levels"] = _json(quantizer.levels)
    if quantizer.scale_format:
        document["scale_format"] = quantizer.scale_format
    if quantizer.dynamic is not None:
        document["dynamic"] = dataclasses.asdict(quantizer.dynamic)
    return document


def _quantizer(document: Mapping[str, Any]) -> grid.Quantizer:
    static = ("scale_format", "dynamic")
    arrays = {k: np.asarray(v, np.float32) for k, v in document.items() if k not in static}
    dynamic = document.get("dynamic")
    return grid.Quantizer(
        **arrays,
        scale_format=document.get("scale_format", ""),
        dynamic=None if dynamic is None else grid.Dynamic(**dynamic),
    )


def _numpy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _numpy(v) for k, v in tree.items()}
    return np.ascontiguousarray(tree)


def _json(array: Array) -> Any:
    """A float32 array as JSON numbers, which hold each float32 exactly; whole ones without ".0"."""
    values = np.asarray(array, np.float32).astype(float)
    whole = np.isfinite(values).all() and (values == np.round(values)).all()
    return (values.astype(int) if whole else values).tolist()
