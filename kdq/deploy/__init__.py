"""Deployment: files that are really smaller, and the models loaded back from them."""

from kdq.deploy.export import ExportError, ParityError, export
from kdq.deploy.formats.catalog import FORMATS, check_formats
from kdq.deploy.formats.onnx.model import layer_names, onnx_session, save_onnx, to_onnx
from kdq.deploy.formats.packed import (
    ModelNotImportedError,
    PackedFileError,
    PackedModel,
    load_packed,
    save_packed,
)
from kdq.deploy.formats.stablehlo import load_stablehlo, save_stablehlo
from kdq.deploy.lower.lower import lower
from kdq.deploy.lower.model import IntegerModel

__all__ = [
    "FORMATS",
    "ExportError",
    "IntegerModel",
    "ModelNotImportedError",
    "PackedFileError",
    "PackedModel",
    "ParityError",
    "check_formats",
    "export",
    "layer_names",
    "load_packed",
    "load_stablehlo",
    "lower",
    "onnx_session",
    "save_onnx",
    "save_packed",
    "save_stablehlo",
    "to_onnx",
]
