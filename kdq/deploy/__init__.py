"""Deployment: files that are really smaller, and the models loaded back from them."""

from kdq.deploy.lowering import IntegerModel, lower
from kdq.deploy.packed import PackedFileError, PackedModel, load_packed, save_packed

__all__ = [
    "IntegerModel",
    "PackedFileError",
    "PackedModel",
    "load_packed",
    "lower",
    "save_packed",
]
