"""The formats that a model is exported in, by name."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from kdq.deploy import extras
from kdq.deploy.formats import litert, stablehlo
from kdq.deploy.formats.onnx import model as onnx_model
from kdq.deploy.formats.packed import load_packed
from kdq.deploy.formats.runtime import Runtime
from kdq.deploy.lower.model import IntegerModel
from kdq.fields import unknown
from kdq.quantize.inputs import Batch
from kdq.quantize.network import Network


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to export."""

    path: Path  # the packed file
    integer: IntegerModel
    inputs: Batch  # to compare on
    integers: Mapping[str, Any]  # of them, what each integer layer takes and makes in JAX
    about: Mapping[str, str]  # texts to keep in a file
    network: Network | nn.Module | None = None  # to load the packed file into


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A form that a model can be exported in."""

    file: str  # its name
    extra: str = ""  # of kdq, that installs what it needs; "" is none
    packages: tuple[str, ...]  # whose versions decide what is in it and what it does
    save: Callable[[Path, Source], dict[str, Any]]  # returns what the manifest shall say of it
    # With as many threads, or one a core; into this network, if the format needs one.
    load: Callable[[Path, int | None, Network | nn.Module | None], Runtime]
    # What each integer layer makes, by name, in the order of `Source.integers`; None: it can't say.
    layer_integers: Callable[[Source], dict[str, np.ndarray]] | None = None
    simulates: bool = False  # its runtime is the simulation


def check_formats(formats: Sequence[str]) -> None:
    """Checks the names of formats, and that the libraries that they need are installed.

    Raises:
      ValueError: an unknown format.
      ImportError: a library is missing; says how to install it.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(unknown("export format", name, FORMATS))
        if FORMATS[name].extra:
            modules = [package.replace("-", "_") for package in FORMATS[name].packages]
            extras.load(FORMATS[name].extra, *modules)


def _save_packed(path: Path, source: Source) -> dict[str, Any]:
    shutil.copyfile(source.path, path)
    return {}


def _save_onnx(path: Path, source: Source, **options: Any) -> dict[str, Any]:
    onnx_model.save_onnx(path, source.integer, source.inputs, metadata=source.about, **options)
    return {"opset": onnx_model.opset(source.integer)}


def _save_litert(path: Path, source: Source) -> dict[str, Any]:
    path.write_bytes(litert.to_litert(source.integer, source.inputs))
    return {}


def _save_stablehlo(path: Path, source: Source) -> dict[str, Any]:
    how = {"platforms": ("cpu", "cuda")}
    stablehlo.save_stablehlo(path, source.integer, source.inputs, metadata=source.about, **how)
    return how


def _onnx_integers(source: Source) -> dict[str, np.ndarray]:
    proto = onnx_model.to_onnx(source.integer, source.inputs, each_layer=True)
    names = onnx_model.layer_names(source.integer, source.inputs)
    outputs = onnx_model.load_onnx(proto.SerializeToString())(source.inputs)
    return dict(zip(names, outputs[-len(names) :], strict=True)) if names else {}


_ONNX = {"extra": "onnx", "packages": ("jax2onnx", "onnx", "onnxruntime")}
FORMATS = {
    "packed": Format(
        file="model.safetensors",
        packages=("safetensors",),
        save=_save_packed,
        load=lambda path, _, network: Runtime(load_packed(path, network)),
        simulates=True,
    ),
    "onnx": Format(
        file="model.onnx",
        **_ONNX,
        save=_save_onnx,
        load=lambda path, threads, _: onnx_model.load_onnx(path, threads=threads),
        layer_integers=_onnx_integers,
    ),
    "onnx_int8": Format(
        file="model.int8.onnx",
        **_ONNX,
        save=functools.partial(_save_onnx, symmetric=True),
        load=lambda path, threads, _: onnx_model.load_onnx(path, threads=threads, integer=False),
        simulates=True,  # TensorRT would not
    ),
    "litert": Format(
        file="model.tflite",
        extra="litert",
        packages=("ai-edge-litert", "litert-converter"),
        save=_save_litert,
        load=lambda path, threads, _: litert.load_litert(path, threads=threads),
    ),
    "stablehlo": Format(
        file="model.stablehlo",
        packages=("jax", "jaxlib"),
        save=_save_stablehlo,
        load=lambda path, *_: stablehlo.load_stablehlo(path).runtime(),
    ),
}
