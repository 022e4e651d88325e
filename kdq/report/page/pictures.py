"""Small images and maps of attributions as data URIs."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

NEGATIVE, ZERO, POSITIVE = ((59, 120, 194), (245, 245, 245), (201, 84, 44))


def gray(image: Sequence[Sequence[float]]) -> str:
    """Returns an image, from its darkest to its brightest pixel."""
    values = np.asarray(image, np.float64)
    span = np.ptp(values) or 1.0
    return _uri(np.repeat(255 * ((values - values.min()) / span)[..., None], 3, -1))


def signed(values: Sequence[Sequence[float]]) -> str:
    """Returns a map: red speaks for the class, blue against it, to its own largest value."""
    array = np.asarray(values, np.float64)
    share = (array / (np.abs(array).max() or 1.0))[..., None]
    ends = np.where(share > 0, np.asarray(POSITIVE), np.asarray(NEGATIVE))
    return _uri(np.asarray(ZERO) * (1 - np.abs(share)) + ends * np.abs(share))


def _uri(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(np.round(pixels).astype(np.uint8)).save(out, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
