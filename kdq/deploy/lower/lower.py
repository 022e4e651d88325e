"""Lowering: a simulated model becomes one whose layers multiply integers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import quantize
from kdq.deploy import qtensor
from kdq.deploy.flow.layer import LayerCode
from kdq.deploy.integer_layer import IntegerLayer, MadeLayer, Rounded, make_integer_layer
from kdq.deploy.lower.model import LOWERED, FloatLayer, IntegerModel, Static, StaticLayer
from kdq.deploy.lower.trace import Structure, trace_structure
from kdq.quantize.grid import Quantizer
from kdq.quantize.inputs import Batch, Inputs, as_inputs, unboxed
from kdq.quantize.kinds import Unsupported
from kdq.quantize.layers import LayerInfo
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.paths import at_path, copied, unknown_layer
from kdq.quantize.ptq import norms as norms_lib
from kdq.quantize.ptq.norms import Norm
from kdq.quantize.ptq.watch import output_channels
from kdq.types import Array, Variables


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
    for path in qparams:
        if path in structure.unquantized:
            raise ValueError(
                f"qparams quantize {path!r}, which must stay in float: "
                f"{structure.unquantized[path]}; calibrate anew"
            )
        if path not in structure.layers:
            raise unknown_layer("qparams", path, variables.get("params", {}))
    in_float = {path: "no rule quantizes it" for path in structure.layers if path not in qparams}
    in_float |= structure.unquantized
    lowered = {path: _lower_layer(path, structure, variables, qparams[path]) for path in qparams}
    params, layers, biases, folded = dict(variables.get("params", {})), {}, {}, set()
    numbers: dict[Any, int] = {}  # of the grids
    for path, layer in lowered.items():
        info = structure.layers[path]
        biases |= _rounded_biases(variables, info, layer.norm, layer.rounded)
        in_float |= layer.reasons
        folded |= {layer.norm.path} if layer.norm is not None else set()
        arrays = copied(params, path, "qparams")
        layers[path] = _replace_arrays(arrays, info, qparams[path], layer, numbers)
    for path in folded:
        in_float.pop(path, None)
    static = Static(
        network=network,
        layers=tuple(layers.items()),
        folded=frozenset(folded),
        in_float=tuple(in_float.items()),
        fixed_point=fixed_point,
    )
    variables = {**variables, "params": params}
    return IntegerModel(variables, keywords=Inputs(**kwargs), biases=biases, static=static)


class _LoweredLayer(NamedTuple):
    """A layer, or a stack of them, as it was lowered."""

    layer: IntegerLayer | None  # None: it computes in float
    reasons: dict[str, str]  # why: of the layer, or of the norm behind it
    largest: int = 0  # a bound of its sums
    norm: Norm | None = None  # the batch norm that is part of it
    rounded: tuple[Rounded | None, ...] = ()  # its bias; of each layer of a stack


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
    arrays = (inputs, weight, bias, *affine)
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
    info: LayerInfo, calls: list[LayerCode], arrays: tuple, norm: Norm | None
) -> MadeLayer:
    """Makes one layer of a stack of its arrays; the last two are the norm's, by channel."""
    inputs, weight, bias, factor, offset = arrays
    if norm is not None:
        channels = output_channels(info)
        if not set(norm.axes) <= set(channels):
            raise Unsupported(f"the norm's axes {norm.axes} are no output channels")
        axes = [channels[axis] for axis in norm.axes]
        weight = qtensor.scaled(weight, _broadcast_to_axes(factor, axes, len(info.weight_shape)))
        if bias is not None:
            aligned = lambda values: _align_with_bias(values, norm, info, bias.ndim)
            bias, offset = bias * aligned(factor) + aligned(offset), None
        else:
            offset = _broadcast_to_axes(offset, norm.axes, len(info.output_shape))
    made = [
        make_integer_layer(call.traced, call.roles, inputs, weight, bias, offset) for call in calls
    ]
    if len({str(jax.tree.map(jnp.shape, layer)) for layer, _, _ in made}) > 1:
        raise Unsupported("it is called with inputs of several ranks")
    return made[0]


def _replace_arrays(
    arrays: dict[str, Any],
    info: LayerInfo,
    quantizers: Mapping[str, Quantizer],
    lowered: _LoweredLayer,
    numbers: dict[Any, int],
) -> StaticLayer:
    """Puts what a layer was lowered to in place of its weight and bias; returns its static part.

    The same grid gets the same of the `numbers`; a stack of layers has grids of its own.
    """
    weight = bias = None
    if "weights" in quantizers:
        array = arrays.pop(info.weight_name)
        weight = info.weight_name, jax.ShapeDtypeStruct(array.shape, array.dtype)
    if lowered.layer is None:
        inputs = {name: quantizers[name] for name in quantizers if name != "weights"}
        codes = None if weight is None else qtensor.from_quantizer(array, quantizers["weights"])
        arrays[LOWERED] = FloatLayer(codes, inputs)
        return StaticLayer(weight)
    arrays[LOWERED] = lowered.layer
    if "bias" in arrays:
        array = arrays.pop("bias")
        bias = jax.ShapeDtypeStruct(array.shape[len(info.stack) :], array.dtype)
    grids = []
    for operand in lowered.layer.inputs:
        quantizer = quantizers[operand]
        fields = (quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax)
        content = tuple(np.asarray(field).tobytes() for field in fields)
        same = (info.path, operand) if np.ndim(quantizer.qmin) else content
        number = numbers.setdefault((same, quantizer.scale_format), len(numbers))
        grids.append((operand, number))
    return StaticLayer(weight, bias, tuple(grids), lowered.largest)


def _broadcast_to_axes(values: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """Aligns values, one axis each for `axes` (negative), with an array of so many axes."""
    shape = [1] * rank
    values = values.transpose(np.argsort(axes))
    for size, axis in zip(values.shape, sorted(axes), strict=True):
        shape[axis] = size
    return values.reshape(shape)


def _align_with_bias(values: np.ndarray, norm: Norm, layer: LayerInfo, rank: int) -> np.ndarray:
    """Aligns numbers of a norm's channels with the bias of the layer before it."""
    places = list(output_channels(layer))
    axes = [places.index(axis) - len(places) for axis in norm.axes]
    return _broadcast_to_axes(values, axes, rank)


def _rounded_biases(
    variables: Variables,
    layer: LayerInfo,
    norm: Norm | None,
    rounded: Sequence[Rounded | None],
) -> dict[str, Array]:
    """Returns the bias, by path, that an integer layer adds: its own, or else that of its norm.

    `rounded` has the change by rounding for each layer of a stack; None for one without a bias.
    """
    biases: dict[str, Array] = {}

    def add(path: str, params: Variables, place: tuple[int, ...], added: np.ndarray) -> None:
        bias = biases.get(path, params["bias"])
        total = np.array(bias, np.float64)
        total[place] += added
        biases[path] = jnp.asarray(total, bias.dtype)

    factor = None if norm is None else norms_lib.affine(norm, variables)[0]
    norm_params = {} if norm is None else norms_lib.params_of(norm, variables)
    for place, change in zip(np.ndindex(layer.stack), rounded, strict=False):
        if change is None:
            continue
        if change.index is not None:
            params = at_path(variables["params"], layer.path)
            added = np.zeros(params["bias"][place].shape)
            spread = np.broadcast_to(change.added, change.index.shape)
            added.flat[change.index.ravel()] = spread.ravel()
            if factor is not None:
                by = _align_with_bias(factor[place], norm, layer, added.ndim)
                by = np.broadcast_to(by, added.shape)
                added = np.divide(added, by, out=np.zeros_like(added), where=by != 0)
            add(layer.path, params, place, added)
        elif "bias" in norm_params and change.added.size == factor[place].size:
            add(norm.path, norm_params, place, change.added.reshape(factor[place].shape))
    return biases
