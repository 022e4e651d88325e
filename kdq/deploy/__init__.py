"""Deployment: files that are really smaller, and the models loaded back from them."""

from kdq.deploy.lowering import IntegerModel, lower
from kdq.deploy.onnx_model import layer_names, onnx_session, save_onnx, to_onnx
from kdq.deploy.packed import PackedFileError, PackedModel, load_packed, save_packed

__all__ = [
    "IntegerModel",
    "PackedFileError",
    "PackedModel",
    "layer_names",
    "load_packed",
    "lower",
    "onnx_session",
    "save_onnx",
    "save_packed",
    "to_onnx",
]
