"""Number formats: the levels that a code stands for, and what they share a scale over.

Levels are those of ml_dtypes, the library behind JAX's own small floats, but for nf4. Scales have
formats too: what they are rounded to, and how a file holds them.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from scipy.special import ndtri

from kdq.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A grid that is not of integers."""

    levels: tuple[float, ...]  # ascending; a value is a level times a scale
    group_size: int | None = None  # block formats: elements along the inputs that share a scale
    scale_format: str = ""  # of that scale: a key of `ROUNDINGS`

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.levels) - 1).bit_length()


def _finite(dtype: type) -> tuple[float, ...]:
    """Every finite value of a float type of 8 bits or fewer; the two zeros are one."""
    width = ml_dtypes.finfo(dtype).bits
    values = np.arange(2**width, dtype=np.uint8).view(dtype).astype(np.float64)
    return tuple(np.unique(values[np.isfinite(values)]).tolist())


def _normal_float() -> tuple[float, ...]:
    """nf4: 16 quantiles of a normal distribution, with 0 and ±1 among them (arXiv:2305.14314).

    Eight positive and seven negative ones, at evenly spaced probabilities from the outermost to the
    middle; the outermost is the mean of 1 - 1/30 and 1 - 1/32.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    positive = ndtri(np.linspace(outermost, 0.5, 9)[:-1])
    negative = -ndtri(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    return tuple((levels / levels[-1]).tolist())


E4M3, E5M2, E2M1 = (
    _finite(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn)
)

FORMATS = {
    "fp8_e4m3": Format(levels=E4M3),
    "fp8_e5m2": Format(levels=E5M2),
    "fp4_e2m1": Format(levels=E2M1),
    "nf4": Format(levels=_normal_float()),
    # The OCP microscaling formats, version 1.0: blocks of 32 that share a power of two.
    "mxfp8_e4m3": Format(levels=E4M3, group_size=32, scale_format="e8m0"),
    "mxfp8_e5m2": Format(levels=E5M2, group_size=32, scale_format="e8m0"),
    "mxfp4": Format(levels=E2M1, group_size=32, scale_format="e8m0"),
    # Blocks of 16 that share an e4m3 number times a float32 of the whole tensor.
    "nvfp4": Format(levels=E2M1, group_size=16, scale_format="e4m3"),
}


def _power_of_two(scale: Array, levels: Array | None) -> Array:
    """The next power of two above, so that no range shrinks (TQT, arXiv:1903.08066)."""
    mantissa, exponent = jnp.frexp(scale)
    return jnp.ldexp(1.0, jnp.where(mantissa == 0.5, exponent - 1, exponent))


def _e8m0(scale: Array, levels: Array | None) -> Array:
    """The power of two that brings a block's largest number into the topmost binade of the levels.

    2^(floor(log2 reach) - floor(log2 levels[-1])), as the microscaling specification has it: what
    then exceeds the largest level is clipped to it.
    """
    exponent = lambda x: jnp.frexp(x)[1] - 1
    top = levels[-1]
    return jnp.ldexp(1.0, exponent(scale * top) - exponent(top))


def _e4m3(scale: Array, levels: Array | None) -> Array:
    """A number of 8 bits times a float32 of the tensor, by which its largest scale is 448."""
    tensor = tensor_scale(scale)
    smallest = E4M3[len(E4M3) // 2 + 1]
    steps = jnp.asarray(scale / tensor, jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.maximum(steps, smallest) * tensor


def tensor_scale(scale: Array) -> Array:
    """The float32 that all scales of a tensor share in the format e4m3."""
    return scale.max() / E4M3[-1]


# Each takes a scale and the levels that it is for; of one layer, not of a stack.
ROUNDINGS: dict[str, Callable[[Array, Array | None], Array]] = {
    "power_of_two": _power_of_two,
    "e8m0": _e8m0,
    "e4m3": _e4m3,
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A format of scales that a file holds in 8 bits."""

    dtype: type
    shared: bool = False  # times a float32 that the scales of a tensor share, see `tensor_scale`


# The other formats are stored as float32.
STORED = {
    "e8m0": Stored(ml_dtypes.float8_e8m0fnu),
    "e4m3": Stored(ml_dtypes.float8_e4m3fn, shared=True),
}


def encode(scale: np.ndarray, shared: np.ndarray, format: str) -> np.ndarray:
    """The bytes of scales that a format rounded; an e8m0 byte is the exponent, with a bias of 127.

    Args:
      scale: any shape, float32, as rounded.
      shared: float32 that broadcasts with it, 1 if the format has none.
      format: a key of `STORED`.

    Returns:
      uint8, of the shape of `scale`.

    Raises:
      ValueError: a scale that is none of the format.
    """
    with np.errstate(all="ignore"):  # what overflows is refused below
        codes = (scale / shared).astype(STORED[format].dtype)
        wrong = ~(codes.astype(np.float32) * shared == scale) | ~np.isfinite(scale) | (scale <= 0)
    if wrong.any():
        raise ValueError(f"a scale of {scale[wrong][0]} is no number of the format {format!r}")
    return codes.view(np.uint8)


def decode(codes: np.ndarray, shared: np.ndarray, format: str) -> np.ndarray:
    """The float32 scales that were encoded.

    Raises:
      ValueError: not bytes, or one that stands for no positive number.
    """
    if codes.dtype != np.uint8:
        raise ValueError(f"scales of the format {format!r} are uint8, got {codes.dtype}")
    scale = codes.view(STORED[format].dtype).astype(np.float32) * shared
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"scales of the format {format!r} that are no positive numbers")
    return scale


def stored_bytes(scales: int, layers: int, format: str) -> int:
    """Returns the bytes of so many scales, of so many stacked layers, in a packed file."""
    if format not in STORED:
        return 4 * scales
    return scales + 4 * layers * STORED[format].shared
