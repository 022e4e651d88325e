"""Number formats: the levels that a code stands for, and what they share a scale over.

Levels are those of ml_dtypes, the library behind JAX's own small floats, but for nf4.
"""

import dataclasses

import ml_dtypes
import numpy as np
from scipy.special import ndtri


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A grid that is not of integers."""

    levels: tuple[float, ...]  # ascending; a value is a level times a scale
    group_size: int | None = None  # block formats: elements along the inputs that share a scale
    scale_format: str = ""  # of that scale: a key of scale_formats.ROUNDINGS

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
