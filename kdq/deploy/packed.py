"""The packed file: a model in one safetensors file, sub-byte weights really packed.

Tensors: `PATH/WEIGHT` as packed bytes where the weight is quantized, with its `PATH/WEIGHT:scale`
(and `:zero_point`, where that is not 0) beside it; every other array as it is. The scales of block
formats are bytes, `:scale_e8m0` or `:scale_e4m3`, the second with a float32 of the tensor in
`:scale_tensor`; a reader that knows `:scale` alone finds none and refuses. The metadata hold one
JSON document under "kdq" (see `Header`), with a checksum of it and of the tensors.

Reading never runs what is in the file, and allocates no more than its arrays are, unpacked.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kdq import models, quantize
from kdq.deploy import container
from kdq.deploy.lowering import IntegerModel, lower
from kdq.deploy.packing import pack, unpack
from kdq.deploy.qtensor import codes_and_scale
from kdq.fields import ConfigError, build
from kdq.quantize import grid, scale_formats
from kdq.quantize.inputs import unboxed
from kdq.quantize.kinds import WEIGHT_NAMES
from kdq.types import Array, QParams, Variables

FORMAT_VERSION = 3


class PackedFileError(ValueError):
    """A file that is no packed model, or one that does not fit together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The document of a packed file."""

    format: int
    model: Mapping[str, Any]  # the module's name and fields
    layers: Mapping[str, "Layer"]  # the quantized ones, by path
    metadata: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """How a layer is quantized."""

    weight: "Weight | None" = None
    inputs: Mapping[str, "Input"] = dataclasses.field(default_factory=dict)  # by operand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A packed weight."""

    name: str  # of the parameter
    shape: tuple[int, ...]
    bits: int
    qmin: Any  # the number that the code 0 stands for; of a stack of layers, nested lists
    zero_point: Any  # the same; None: in a tensor of its own
    levels: Any = None  # of a number format
    scale_format: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """The quantizer of an input: see `kdq.quantize.grid.Quantizer`."""

    scale: Any
    zero_point: Any
    qmin: Any
    qmax: Any
    levels: Any = None
    scale_format: str = ""
    dynamic: grid.Dynamic | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A model loaded from a packed file."""

    model: nn.Module
    variables: Variables  # quantized weights already as the numbers their codes stand for
    qparams: QParams  # the quantizers of the layers' inputs
    weight_quantizers: QParams  # those that made the codes: what `variables` are on the grids of
    metadata: Mapping[str, Any]  # what was given to `save_packed`

    def __call__(self, inputs: Array) -> Array:
        """The outputs in evaluation mode, [batch, classes] for our models."""
        return quantize.predict(self.model, self.variables, self.qparams, inputs)

    def lower(self, inputs: Array | tuple, *, fixed_point: bool = False) -> IntegerModel:
        """The integer model, in evaluation mode; see `lower`. Only the shapes of inputs matter."""
        paths = {*self.qparams, *self.weight_quantizers}
        qparams = {
            path: {**self.weight_quantizers.get(path, {}), **self.qparams.get(path, {})}
            for path in paths
        }
        return lower(
            self.model, self.variables, qparams, inputs, fixed_point=fixed_point, train=False
        )


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
      model: `{"name": a module of kdq.models, **fields}`, `kdq.models.describe` of your own model,
        or any other description of it; JSON-able.
      metadata: anything else worth keeping with the model; JSON-able.

    Raises:
      ValueError: a scale that its format does not hold; names the layer.
    """
    arrays = traverse_util.flatten_dict(_numpy(unboxed(variables)), sep="/")
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
    return container.write(path, document, arrays)


def load_packed(path: str | os.PathLike[str], model: nn.Module | None = None) -> PackedModel:
    """Loads a packed file; its outputs equal the simulated model's.

    Args:
      path: the file.
      model: the module to load into; None builds it from the name and fields in the file, a class
        of your own only if its module is imported already.

    Raises:
      FileNotFoundError: no such file.
      PackedFileError: not a packed model, a later format, or tensors that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed model at {path}")
    try:
        return _load(path, model)
    except (ConfigError, container.ContainerError, PackedFileError, RecursionError) as error:
        raise PackedFileError(f"{path} is no packed model: {error}") from error


def _load(path: Path, model: nn.Module | None) -> PackedModel:
    document, arrays = container.read(path)
    if document["format"] != FORMAT_VERSION:
        raise PackedFileError(f"format={document['format']!r}; this kdq reads {FORMAT_VERSION}")
    header = build(Header, document, container.KEY)
    qparams, weight_quantizers = {}, {}
    for layer, entry in header.layers.items():
        try:
            if entry.weight is not None:
                name = _weight_path(layer, entry.weight.name)
                arrays[name], quantizer = _unpack_weight(arrays, name, entry.weight)
                weight_quantizers[layer] = {"weights": quantizer}
            if entry.inputs:
                qparams[layer] = {k: _quantizer(k, v) for k, v in entry.inputs.items()}
        except KeyError as error:
            raise PackedFileError(f"layer {layer!r} has no {error}") from error
        except (ValueError, OverflowError) as error:
            raise PackedFileError(f"layer {layer!r}: {error}") from error
    if model is None:
        name = header.model.get("name")
        if models.is_own(name) and not models.is_imported(name):
            raise PackedFileError(
                f"its model is {name!r}, which is not there, and reading imports nothing: do so "
                "first, or give load_packed the model"
            )
        try:
            model = models.build(**header.model)
        except (TypeError, ValueError) as error:
            raise PackedFileError(f"model: {error}") from error
    return PackedModel(
        model=model,
        variables=jax.device_put(traverse_util.unflatten_dict(arrays, sep="/")),
        qparams=qparams,
        weight_quantizers=weight_quantizers,
        metadata=document["metadata"],
    )


def _weight_path(layer: str, weight: str) -> str:
    """The name of a layer's weight; layer "" is the model itself."""
    return "/".join(filter(None, ("params", layer, weight)))


def _pack_weight(arrays: dict[str, np.ndarray], name: str, quantizer: grid.Quantizer) -> dict:
    """Replaces a weight by its packed codes and scales; returns what is needed to undo that."""
    weight, bits = arrays[name], grid.bits(quantizer)
    scale_format = quantizer.scale_format
    quantizer, stored = _pack_scale(weight, quantizer)
    codes = np.asarray(codes_and_scale(weight, quantizer)[0])
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


def _unpack_weight(
    arrays: dict[str, np.ndarray], name: str, info: Weight
) -> tuple[np.ndarray, grid.Quantizer]:
    """A weight's numbers, and the quantizer that makes its codes of them."""
    shape, size = info.shape, math.prod(info.shape)
    if any(axis < 0 for axis in shape):
        raise ValueError(f"weight.shape={shape}: want no negative number")
    codes = unpack(arrays.pop(name), info.bits, size).reshape(shape)
    qmin = _floats(info.qmin, "weight.qmin")
    if qmin.shape != shape[: qmin.ndim]:
        raise ValueError(f"weight.qmin has shape {qmin.shape}, the weight {shape}")
    scale = _unpack_scale(arrays, name, info.scale_format, qmin.shape)
    _check_scale(scale, shape, "scale")
    zero_point = info.zero_point
    if zero_point is None:
        zero_point = arrays.pop(f"{name}:zero_point")
    zero_point = _floats(zero_point, "weight.zero_point")
    if zero_point.ndim and zero_point.shape != scale.shape:
        raise ValueError(f"zero_point has shape {zero_point.shape}, the scale {scale.shape}")
    levels = None
    if info.levels is not None:
        levels = np.atleast_1d(_floats(info.levels, "weight.levels"))
        if levels.shape[:-1] != qmin.shape or codes.max(initial=0) >= levels.shape[-1]:
            raise ValueError(f"weight.levels: {levels.shape} for codes up to {codes.max()}")
    quantizer = grid.Quantizer(
        scale=scale,
        zero_point=np.broadcast_to(zero_point, scale.shape),
        qmin=qmin,
        qmax=qmin + np.float32(2**info.bits - 1),
        levels=None if levels is None else jnp.asarray(levels),
    )
    codes = codes + _beside(qmin, codes)
    return np.asarray(grid.over_stack(grid.from_codes, quantizer)(codes, quantizer)), quantizer


def _check_scale(scale: np.ndarray, shape: tuple[int, ...], where: str) -> None:
    if scale.ndim > len(shape) or any(
        not size or full % size for size, full in zip(scale.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(f"a {where} of shape {scale.shape} for a weight of shape {shape}")
    if scale.dtype != np.float32 or not np.isfinite(scale).all():
        raise ValueError(f"{where}: want finite float32, got {scale.dtype} {scale.shape}")


def _floats(value: Any, where: str) -> np.ndarray:
    """An array of a document."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}={str(value)[:60]}: want numbers") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{where}={str(value)[:60]}: want finite float32 numbers")
    return array


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


def _quantizer(operand: str, info: Input) -> grid.Quantizer:
    names = [
        "scale",
        "zero_point",
        "qmin",
        "qmax",
        *(["levels"] if info.levels is not None else []),
    ]
    arrays = {k: _floats(getattr(info, k), f"inputs.{operand}.{k}") for k in names}
    return grid.Quantizer(**arrays, scale_format=info.scale_format, dynamic=info.dynamic)


def _numpy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _numpy(v) for k, v in tree.items()}
    return np.ascontiguousarray(tree)


def _json(array: Array) -> Any:
    """A float32 array as JSON numbers, which hold each float32 exactly; whole ones without ".0"."""
    values = np.asarray(array, np.float32).astype(float)
    whole = np.isfinite(values).all() and (values == np.round(values)).all()
    return (values.astype(int) if whole else values).tolist()
