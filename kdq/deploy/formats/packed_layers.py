"""Quantized layers in a packed file: codes and scales of weights, quantizers of inputs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdq.deploy.formats.container import pack, unpack
from kdq.deploy.qtensor import codes_and_scale
from kdq.quantize import formats, grid
from kdq.types import Array

# Beyond these float32 holds not every whole number, and codes are lost.
LARGEST_CODE = 2**24
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # below, 1 / scale overflows
DYNAMIC = ("per_tensor", "per_token", "per_group")
DTYPES = ("float32", "bfloat16", "float16")  # of weights that can be packed
FIELDS = ("scale", "zero_point", "qmin", "qmax")  # of a quantizer, that are arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer's quantizers."""

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
    dtype: str = "float32"
    array: str = ""  # its tensor, if that is not called "params/LAYER/NAME"


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


def pack_weight(
    arrays: dict[str, np.ndarray], name: str, weight: Array, quantizer: grid.Quantizer
) -> dict[str, Any]:
    """Replaces a weight by its packed codes and scales; returns the fields of `Weight`.

    Raises ValueError for a weight or a quantizer that a file can't hold.
    """
    weight = np.asarray(weight)
    if weight.dtype.name not in DTYPES:
        raise ValueError(f"its weight is {weight.dtype}: expected one of {DTYPES} to pack it")
    scale_format = quantizer.scale_format
    quantizer, stored = _pack_scale(weight, quantizer)
    check_quantizer(quantizer)
    bits = grid.bits(quantizer)
    codes = np.asarray(codes_and_scale(weight, quantizer)[0])
    qmin = np.asarray(quantizer.qmin)
    codes = codes - _over_stack(qmin, codes)
    arrays[name] = pack(codes.astype(np.uint8), bits)
    arrays.update({f"{name}:{suffix}": array for suffix, array in stored.items()})
    zero_point = np.asarray(quantizer.zero_point)
    constant = float(zero_point.flat[0]) if np.ptp(zero_point) == 0 else None
    if constant is None:
        arrays[f"{name}:zero_point"] = zero_point
    options = {
        "levels": None if quantizer.levels is None else _json(quantizer.levels),
        "scale_format": scale_format if scale_format in formats.STORED else None,
        "dtype": None if weight.dtype == np.float32 else weight.dtype.name,
    }
    return {
        "name": "",
        "shape": weight.shape,
        "bits": bits,
        "qmin": _json(qmin),
        "zero_point": None if constant is None else _json(constant),
        **{k: value for k, value in options.items() if value is not None},
    }


def unpack_weight(
    arrays: dict[str, np.ndarray], name: str, info: Weight
) -> tuple[np.ndarray, grid.Quantizer]:
    """Returns a weight's numbers, and the quantizer that makes its codes of them.

    Its codes and scales are taken out of `arrays`. Raises KeyError for a tensor that is not there,
    ValueError for tensors or fields that do not fit together.
    """
    shape, size = info.shape, math.prod(info.shape)
    if any(axis < 0 for axis in shape):
        raise ValueError(f"weight.shape={shape}: expected no negative number")
    if info.dtype not in DTYPES:
        raise ValueError(f"weight.dtype={info.dtype!r}: expected one of {DTYPES}")
    codes = unpack(arrays.pop(name), info.bits, size).reshape(shape)
    qmin = _floats(info.qmin, "weight.qmin")
    if qmin.shape != shape[: qmin.ndim]:
        raise ValueError(f"weight.qmin has shape {qmin.shape}, the weight {shape}")
    scale = _unpack_scale(arrays, name, info.scale_format, qmin.shape)
    if scale.ndim > len(shape) or any(
        not size or full % size for size, full in zip(scale.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(f"a scale of shape {scale.shape} for a weight of shape {shape}")
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
    check_quantizer(quantizer)
    codes = codes + _over_stack(qmin, codes)
    weight = np.asarray(grid.over_stack(grid.from_codes, quantizer)(codes, quantizer))
    with np.errstate(over="ignore"):
        weight = weight.astype(jnp.dtype(info.dtype))
    if not np.isfinite(weight.astype(np.float32)).all():
        raise ValueError(f"codes times scales up to {scale.max()} are not all finite")
    return weight, quantizer


def check_quantizer(quantizer: grid.Quantizer) -> None:
    """Raises ValueError for a quantizer with no grid: scales that are not positive, not finite or
    too small to divide by, codes that float32 does not hold, levels that do not ascend."""
    scale, zero_point, qmin, qmax = (
        np.asarray(getattr(quantizer, name), np.float32) for name in FIELDS
    )
    wrong = scale[~(np.isfinite(scale) & (scale >= SMALLEST_SCALE))]
    if wrong.size:
        raise ValueError(
            f"a scale of {wrong.flat[0]}: expected finite numbers from {SMALLEST_SCALE:.3g} up"
        )
    for name, code in (("zero_point", zero_point), ("qmin", qmin), ("qmax", qmax)):
        wrong = code[~(abs(code) <= LARGEST_CODE)]
        if wrong.size:
            raise ValueError(f"{name}={wrong.flat[0]}: expected {LARGEST_CODE} at most")
    if qmin.shape != qmax.shape or not (qmin < qmax).all():
        raise ValueError(f"qmin={qmin.tolist()}, qmax={qmax.tolist()}: expected qmin < qmax")
    if quantizer.levels is not None:
        levels = np.asarray(quantizer.levels, np.float32)
        if levels.shape[:-1] != qmin.shape or levels.shape[-1] < 2:
            raise ValueError(f"levels of shape {levels.shape}: expected two or more of each layer")
        if not (np.isfinite(levels).all() and (np.diff(levels) > 0).all()):
            raise ValueError("levels: expected finite numbers that ascend")
    if quantizer.scale_format not in ("", *formats.ROUNDINGS):
        valid = tuple(formats.ROUNDINGS)
        raise ValueError(f"scale_format={quantizer.scale_format!r}: expected one of {valid}")


def quantizer_json(quantizer: grid.Quantizer) -> dict[str, Any]:
    """Returns the quantizer of an input as the fields of `Input`, but for what it trains by. Raises
    ValueError for one that has no grid."""
    check_quantizer(quantizer)
    levels, dynamic = quantizer.levels, quantizer.dynamic
    options = {
        "levels": None if levels is None else _json(levels),
        "scale_format": quantizer.scale_format or None,
        "dynamic": None if dynamic is None else dataclasses.asdict(dynamic),
    }
    document = {k: _json(getattr(quantizer, k)) for k in FIELDS}
    return document | {k: value for k, value in options.items() if value is not None}


def input_quantizer(operand: str, info: Input) -> grid.Quantizer:
    """Returns the quantizer of an input. Raises ValueError for one that has no grid."""
    where, how = f"inputs.{operand}", info.dynamic
    names = [*FIELDS, *(["levels"] if info.levels is not None else [])]
    if operand == "weights":
        raise ValueError(f"{where}: no input has that name")
    arrays = {k: _floats(getattr(info, k), f"{where}.{k}") for k in names}
    if how is not None:
        kind, size = how.granularity, how.group_size
        if kind not in DYNAMIC:
            raise ValueError(f"{where}.dynamic.granularity={kind!r}: expected one of {DYNAMIC}")
        if kind == "per_group" and not (size or 0) >= 1:
            raise ValueError(f"{where}.dynamic.group_size={size}: expected 1 or more")
    quantizer = grid.Quantizer(**arrays, scale_format=info.scale_format, dynamic=how)
    try:
        check_quantizer(quantizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return quantizer


def _pack_scale(
    weight: np.ndarray, quantizer: grid.Quantizer
) -> tuple[grid.Quantizer, dict[str, np.ndarray]]:
    """Returns the quantizer with the scale that its format holds, and its arrays by suffix."""
    name = quantizer.scale_format
    if not name:
        return quantizer, {"scale": np.asarray(quantizer.scale)}
    of_layer = lambda _, q: (grid.with_rounded_scale(q).scale, formats.tensor_scale(q.scale))
    scale, shared = map(np.asarray, grid.over_stack(of_layer, quantizer)(weight, quantizer))
    quantizer = quantizer.replace(scale=scale, scale_format="")
    if name not in formats.STORED:
        return quantizer, {"scale": scale}
    if not formats.STORED[name].shared:
        return quantizer, {f"scale_{name}": formats.encode(scale, np.float32(1), name)}
    codes = formats.encode(scale, _over_stack(shared, scale), name)
    return quantizer, {f"scale_{name}": codes, "scale_tensor": shared}


def _unpack_scale(
    arrays: dict[str, np.ndarray], name: str, scale_format: str, stack: tuple[int, ...]
) -> np.ndarray:
    if not scale_format:
        scale = arrays.pop(f"{name}:scale")
        if scale.dtype != np.float32:
            raise ValueError(f"scale: expected float32, got {scale.dtype}")
        return scale
    if scale_format not in formats.STORED:
        raise ValueError(f"{scale_format=}: expected one of {tuple(formats.STORED)}")
    codes, shared = arrays.pop(f"{name}:scale_{scale_format}"), np.float32(1)
    if formats.STORED[scale_format].shared:
        shared = arrays.pop(f"{name}:scale_tensor")
        if (shared.dtype, shared.shape) != (np.float32, stack):
            raise ValueError(
                f"scale_tensor: expected float32 {stack}: {shared.dtype} {shared.shape}"
            )
    return formats.decode(codes, _over_stack(shared, codes), scale_format)


def _over_stack(of_stack: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Returns a value for each layer of a stack, shaped to broadcast with an array of it."""
    of_stack = np.asarray(of_stack)
    return of_stack.reshape(*of_stack.shape, *[1] * (array.ndim - of_stack.ndim))


def _floats(value: Any, where: str) -> np.ndarray:
    """Returns an array of a document."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}={str(value)[:60]}: expected numbers") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{where}={str(value)[:60]}: expected finite float32 numbers")
    return array


def _json(array: Array) -> Any:
    """Returns a float32 array as JSON numbers, which hold it exactly; whole ones without ".0"."""
    values = np.asarray(array, np.float32).astype(float)
    whole = np.isfinite(values).all() and (values == np.round(values)).all()
    return (values.astype(int) if whole else values).tolist()
