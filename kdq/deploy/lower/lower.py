"""Lowering: a simulated model becomes one whose layers multiply integers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import quantize
from kdq.deploy import qtensor
from kdq.deploy.integer_layer import IntegerLayer, MadeLayer, Rounded, make_integer_layer
from kdq.deploy.lower.float_layer import LOWERED, FloatLayer
from kdq.deploy.lower.folding import align_with_bias, broadcast_to_axes, rounded_biases
from kdq.deploy.lower.model import IntegerModel, Static, StaticLayer
from kdq.deploy.lower.trace import LayerCode, Structure, trace_structure
from kdq.quantize.grid import Quantizer
from kdq.quantize.inputs import Batch, Inputs, as_inputs, unboxed
from kdq.quantize.kinds import Unsupported
from kdq.quantize.layers import LayerInfo
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.paths import at_path, copied, unknown_layer
from kdq.quantize.ptq import norms as norms_lib
from kdq.quantize.ptq.norms import Norm
from kdq.quantize.ptq.watch import output_channels
from kdq.types import QParams, Variables


def lower(
    network: Network | nn.Module,
    weights: Weights,
    inputs: Batch,
    *,
    fixed_point: bool = False,
    **kwargs: Any,
) -> IntegerModel:
    """Returns the integer model of a simulated one.

    Biases become the integers that are added to sums. Every layer makes the codes that it makes in
    the simulation of `integer.simulated(variables)`, which have these biases.

    Args:
      network: any Linen module, or a `Network`.
      weights: its float variables and its quantizers.
      inputs: of one batch, see `Network.arguments`; only the shapes matter.
      fixed_point: multiply sums by a fixed-point number and shift, as microcontrollers do, rather
        than by a float32; and add sums as integers, as those of a residual block. A code may be
        the next one then.
      **kwargs: further arguments of the module by keyword, arrays or not, kept with the model: a
        call may replace them by its own.

    Returns:
      The model. Its layers multiply codes where weight and input both have integers with fixed
      scales; `in_float` has the others and why. A batch norm behind such a layer becomes part of
      its scale and bias, without a change to its codes.

    Raises:
      KeyError: `qparams` name an unknown layer.
      ValueError: they name one that must stay in float; says why.
    """
    network, batch = as_network(network), as_inputs(inputs)
    variables, qparams = unboxed(weights.variables), quantize.plain(weights.qparams)
    call = Inputs(*batch.args, **kwargs | batch.kwargs)
    structure = trace_structure(network, variables, call)
    in_float = {path: "no rule quantizes it" for path in structure.layers if path not in qparams}
    in_float |= structure.unquantized
    lowered = _lower_layers(structure, variables, qparams)
    grids = _number_grids(qparams, lowered)
    params, layers, biases, folded = dict(variables.get("params", {})), {}, {}, set()
    for path, layer in lowered.items():
        info = structure.layers[path]
        biases |= rounded_biases(variables, info, layer.norm, layer.rounded)
        in_float |= layer.reasons
        folded |= {layer.norm.path} if layer.norm is not None else set()
        arrays = copied(params, path, "qparams")
        layers[path] = _replace_arrays(arrays, info, qparams[path], layer, grids.get(path, {}))
    for path in folded:
        in_float.pop(path, None)
    static = Static(
        network=network,
        layers=tuple(layers.items()),
        folded=frozenset(folded),
        in_float=tuple(in_float.items()),
        fixed_point=fixed_point,
    )
    return IntegerModel(
        variables={**variables, "params": params},
        keywords=Inputs(**kwargs),
        biases=biases,
        static=static,
    )


class _LoweredLayer(NamedTuple):
    """A layer, or a stack of them, as it was lowered."""

    layer: IntegerLayer | None  # None: it computes in float
    reasons: dict[str, str]  # why: of the layer, or of the norm behind it
    largest: int = 0  # a bound of its sums
    norm: Norm | None = None  # the batch norm that is part of it
    rounded: tuple[Rounded | None, ...] = ()  # its bias; of each layer of a stack


def _lower_layers(
    structure: Structure, variables: Variables, qparams: QParams
) -> dict[str, _LoweredLayer]:
    """Lowers each layer that `qparams` quantize, by path."""
    for path in qparams:
        if path in structure.unquantized:
            raise ValueError(
                f"qparams quantize {path!r}, which must stay in float: "
                f"{structure.unquantized[path]}; calibrate anew"
            )
        if path not in structure.layers:
            raise unknown_layer("qparams", path, variables.get("params", {}))
    return {path: _lower_layer(path, structure, variables, qparams[path]) for path in qparams}


def _lower_layer(
    path: str, structure: Structure, variables: Variables, quantizers: Mapping[str, Quantizer]
) -> _LoweredLayer:
    """Lowers a layer with the norm behind it, or else without it, or else leaves it in float."""
    norm, reasons = structure.norms.get(path), {}
    arguments = structure.layers[path], structure.code[path], variables, quantizers
    if norm is not None:
        try:
            return _make_stack(*arguments, norm)
        except Unsupported as error:
            reasons[norm.path] = f"{error}, with the norm in it"
    try:
        return _make_stack(*arguments, None)._replace(reasons=reasons)
    except Unsupported as error:
        return _LoweredLayer(None, {path: str(error)})


class _Arrays(NamedTuple):
    """The arrays of a layer and of the norm behind it."""

    inputs: dict[str, qtensor.InputGrid]
    weight: qtensor.QTensor | None
    bias: np.ndarray | None
    factor: np.ndarray | None  # of the norm, by channel
    offset: np.ndarray | None


def _make_stack(
    info: LayerInfo,
    calls: list[LayerCode | str],
    variables: Variables,
    quantizers: Mapping[str, Quantizer],
    norm: Norm | None,
) -> _LoweredLayer:
    """Makes the integer layer, of a stack if it is one. Raises Unsupported if there is none."""
    if not calls:
        raise Unsupported("it looks up rows, which become floats, and multiplies nothing")
    if reasons := [call for call in calls if isinstance(call, str)]:
        raise Unsupported(reasons[0])
    names = [*info.operands, *(["weights"] if info.weight_name else [])]
    if floats := [name for name in names if name not in quantizers]:
        raise Unsupported(f"no rule quantizes its {' and '.join(floats)}")
    inputs = {name: qtensor.input_grid(quantizers[name]) for name in info.operands}
    weight = bias = None
    if info.weight_name:
        params = at_path(variables["params"], info.path)
        weight = qtensor.from_quantizer(params[info.weight_name], quantizers["weights"])
        bias = None if "bias" not in params else np.asarray(params["bias"], np.float64)
    affine = (None, None) if norm is None else norms_lib.affine(norm, variables)
    arrays = _Arrays(inputs, weight, bias, *affine)
    layers = []
    for index in np.ndindex(info.stack):
        part = jax.tree.map(lambda array: array[index], arrays) if index else arrays  # noqa: B023
        layers.append(_make_layer(info, calls, part, norm))
    layer, largest, rounded = zip(*layers, strict=True)
    whole = layer[0]
    if info.stack:
        stacked = lambda *a: jnp.stack(a).reshape(*info.stack, *a[0].shape)
        whole = jax.tree.map(stacked, *layer)
    return _LoweredLayer(whole, {}, max(largest), norm, rounded)


def _make_layer(
    info: LayerInfo, calls: list[LayerCode], arrays: _Arrays, norm: Norm | None
) -> MadeLayer:
    """Makes one layer of a stack."""
    inputs, weight, bias, factor, offset = arrays
    if norm is not None:
        channels = output_channels(info)
        if not set(norm.axes) <= set(channels):
            raise Unsupported(f"the norm's axes {norm.axes} are no output channels")
        axes = [channels[axis] for axis in norm.axes]
        weight = qtensor.scaled(weight, broadcast_to_axes(factor, axes, len(info.weight_shape)))
        if bias is not None:
            aligned = lambda values: align_with_bias(values, norm, info, bias.ndim)
            bias, offset = bias * aligned(factor) + aligned(offset), None
        else:
            offset = broadcast_to_axes(offset, norm.axes, len(info.output_shape))
    made = [
        make_integer_layer(call.code, call.roles, inputs, weight, bias, offset) for call in calls
    ]
    if len({str(jax.tree.map(jnp.shape, layer)) for layer, _, _ in made}) > 1:
        raise Unsupported("it is called with inputs of several ranks")
    return made[0]


def _number_grids(
    qparams: QParams, lowered: Mapping[str, _LoweredLayer]
) -> dict[str, dict[str, int]]:
    """Returns the same number for the same grid; a stack of layers has one of its own."""
    numbers: dict[Any, int] = {}
    grids: dict[str, dict[str, int]] = {}
    for path, layer in lowered.items():
        for operand in layer.layer.inputs if layer.layer is not None else ():
            quantizer = qparams[path][operand]
            content = tuple(
                np.asarray(getattr(quantizer, name)).tobytes()
                for name in ("scale", "zero_point", "qmin", "qmax")
            )
            same = (path, operand) if np.ndim(quantizer.qmin) else content
            number = numbers.setdefault((same, quantizer.scale_format), len(numbers))
            grids.setdefault(path, {})[operand] = number
    return grids


def _replace_arrays(
    arrays: dict[str, Any],
    info: LayerInfo,
    quantizers: Mapping[str, Quantizer],
    lowered: _LoweredLayer,
    grids: Mapping[str, int],
) -> StaticLayer:
    """Puts what a layer was lowered to in place of its weight and bias; returns its static part."""
    weight = bias = None
    inputs = {name: quantizers[name] for name in quantizers if name != "weights"}
    lowered_to = FloatLayer(None, inputs) if lowered.layer is None else lowered.layer
    if "weights" in quantizers:
        array = arrays.pop(info.weight_name)
        weight = info.weight_name, jax.ShapeDtypeStruct(array.shape, array.dtype)
        if lowered.layer is None:
            codes = qtensor.from_quantizer(array, quantizers["weights"])
            lowered_to = lowered_to.replace(weight=codes)
    if lowered.layer is not None and "bias" in arrays:
        array = arrays.pop("bias")
        bias = jax.ShapeDtypeStruct(array.shape[len(info.stack) :], array.dtype)
    arrays[LOWERED] = lowered_to
    return StaticLayer(weight, bias, tuple(grids.items()), lowered.largest)
