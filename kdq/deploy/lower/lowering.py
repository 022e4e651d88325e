"""Lowering: a simulated model becomes one whose layers multiply integers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdq import quantize
from kdq.deploy import integer_layer, primitives, qtensor
from kdq.deploy.flow import network
from kdq.deploy.flow.network import LayerCall
from kdq.deploy.integer_layer import IntegerLayer, Rounded
from kdq.deploy.lower.folding import foldable, of_bias, rounded_biases, spread
from kdq.deploy.lower.layer_code import LayerCode, layer_code, list_code
from kdq.deploy.qtensor import QTensor
from kdq.quantize import kinds
from kdq.quantize.calls import ModuleCall, run
from kdq.quantize.grid import Quantizer
from kdq.quantize.inputs import Batch, Inputs, as_inputs, reboxed, unboxed
from kdq.quantize.kinds import Unsupported
from kdq.quantize.layers import LayerInfo, list_layers, list_unquantized
from kdq.quantize.network import Network
from kdq.quantize.paths import copied, unknown_layer
from kdq.quantize.ptq import norms as norms_lib
from kdq.quantize.ptq.norms import Norm
from kdq.quantize.ptq.watch import output_channels
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

# Where a layer finds what it computes with: in "params", which Linen's lifted transforms slice.
LOWERED = "_lowered"


class FloatLayer(flax.struct.PyTreeNode):
    """A layer that multiplies floats: its weight is kept as codes if it was quantized."""

    weight: QTensor | None
    inputs: dict[str, Quantizer]  # what its inputs are rounded by


@dataclasses.dataclass(frozen=True)
class _Static:
    """What of an integer model is not arrays."""

    model: nn.Module
    grids: tuple[tuple[tuple[str, str], int], ...]  # {(path, operand): equal numbers, equal grids}
    largest: tuple[tuple[str, int], ...]  # {path: bound of the sums}
    weights: tuple[tuple[str, str, tuple[int, ...], Any], ...]  # (path, name, shape, dtype)
    biases: tuple[tuple[str, tuple[int, ...], Any], ...]  # (path, shape, dtype)
    folded: frozenset[str]  # batch norms that are part of the layer before them
    in_float: tuple[tuple[str, str], ...]  # {path: why}
    fixed_point: bool


class IntegerModel(flax.struct.PyTreeNode):
    """A model whose quantized layers compute with integers; a pytree, jittable.

    Between layers codes stay codes wherever an output is only rounded to one grid again. What is
    not a layer (additions, normalization, softmax) is float, and so are the layers `in_float`.
    """

    variables: Variables
    keywords: Inputs  # given to `lower`: of the model's call
    biases: dict[str, Array]  # {path of a layer or a norm: its bias, float, as integers have it}
    static: _Static = flax.struct.field(pytree_node=False)

    @property
    def in_float(self) -> dict[str, str]:
        """What computes in float, with the reason, by module path."""
        return dict(self.static.in_float)

    def simulated(self, variables: Variables) -> Variables:
        """`variables`, those that were lowered, with the biases that this model adds.

        A bias of an integer layer is an int32 at the scale of its sums, which at few bits is coarse
        enough to move codes. Simulated with these variables (`quantize.apply`, a packed file of
        them), every layer gets the codes that this model has. Where a batch norm is part of a layer
        without a bias, it is the norm's that changes.
        """
        changed = unboxed(variables)
        params = dict(changed.get("params", {}))
        for path, bias in self.biases.items():
            copied(params, path, "the integer model's biases")["bias"] = bias
        return reboxed({**changed, "params": params}, variables)

    def __call__(self, inputs: Batch) -> Array:
        """The outputs in evaluation mode; compiled once for a shape."""
        return _predict(self, inputs)

    def apply(
        self,
        inputs: Batch,
        *,
        unroll: bool = False,
        made: dict[str, Array] | None = None,
    ) -> Array:
        """The same, to be traced by a function of yours.

        Args:
          inputs: an array, a tuple of positional arguments, another pytree of arrays that is one
            argument, or `quantize.Inputs`, whose keywords replace those that `lower` got.
          unroll: write each layer of a scanned stack out.
          made: gets the uint8 codes that each integer layer takes, as PATH/activations (and
            PATH/other), and what it makes of them, as PATH: uint8 codes of the next grid, or int32
            sums. Of a later call of a layer PATH is PATH#2, ... Layers of a stack are in it if they
            are unrolled.
        """
        call = self._call(inputs)
        traced, structure = _trace(self, call)
        leaves = jax.tree.leaves((self.variables, call))
        outputs = network.run(
            traced,
            leaves,
            unroll=unroll,
            made={} if made is None else made,
            fixed_point=self.static.fixed_point,
        )
        return jax.tree.unflatten(structure, outputs)

    def evaluate(self, inputs: Batch, binder: Callable) -> Array:
        """The outputs with `binder(program)(eqn, values)` for each equation, to be traced.

        A layer is one equation, `network.layer_p`, between floats. Layers of a stack are unrolled.
        """
        call = self._call(inputs)
        traced, structure = _trace(self, call)
        leaves = jax.tree.leaves((self.variables, call))
        flat = network.inlined(traced, leaves, unroll=True)
        return jax.tree.unflatten(structure, network.evaluate(flat, leaves, binder(flat.jaxpr)))

    def _call(self, inputs: Batch) -> Inputs:
        call = as_inputs(inputs)
        return Inputs(*call.args, **{**self.keywords.kwargs, **call.kwargs})


@jax.jit
def _predict(lowered: IntegerModel, inputs: Batch) -> Array:
    return lowered.apply(inputs)


def _trace(lowered: IntegerModel, call: Inputs) -> tuple[core.ClosedJaxpr, Any]:
    static = lowered.static

    def forward(variables: Variables, call: Inputs) -> Any:
        # Modules with a `setup` ask for their weight when they are made. Nothing uses it.
        params = dict(variables["params"])
        for path, name, shape, dtype in static.weights:
            copied(params, path, "weights")[name] = jnp.zeros(shape, dtype)
        integers = functools.partial(_integer_call, static)
        return run(static.model, {**variables, "params": params}, call, integers)[0]

    traced, shape = jax.make_jaxpr(forward, return_shape=True)(lowered.variables, call)
    return traced, jax.tree.structure(shape)


def lower(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Batch,
    *,
    fixed_point: bool = False,
    **apply_kwargs: Any,
) -> IntegerModel:
    """The integer model of a simulated one.

    Biases become the integers that are added to sums. Every layer makes the codes that it makes in
    the simulation of `integer.simulated(variables)`, which have these biases.

    Args:
      model: any Linen module.
      variables: its float variables.
      qparams: its quantizers.
      inputs: of one batch, as of `quantize.apply`; only the shapes matter.
      fixed_point: multiply sums by a fixed-point number and shift, as microcontrollers do, rather
        than by a float32; and add sums as integers, as those of a residual block. A code may be
        the next one then.
      **apply_kwargs: passed to the model, in evaluation mode, e.g. `train=False`, and kept.

    Returns:
      The model. Its layers multiply codes where weight and input both have integers with fixed
      scales; `in_float` has the others and why. A batch norm behind such a layer becomes part of
      its scale and bias, without a change to its codes.

    Raises:
      KeyError: `qparams` name a layer that there is not.
      ValueError: they name one that must stay in float; says why.
    """
    variables, qparams = unboxed(variables), quantize.plain(qparams)
    call = Network(model).arguments(inputs, **apply_kwargs)
    layers, unquantized, _, _ = _structure(model, variables, call)
    in_float = {path: "no rule quantizes it" for path in layers if path not in qparams}
    in_float |= unquantized
    params, folded = dict(variables.get("params", {})), set()
    largest, grids, weights, biases, rounded = {}, {}, [], [], {}
    for path, made in _make_layers(model, variables, qparams, call).items():
        layer, quantizers = layers[path], qparams[path]
        rounded |= rounded_biases(variables, layer, made.norm, made.rounded)
        own = copied(params, path, "qparams")
        weight = own.get(layer.weight_name) if layer.weight_name else None
        in_float |= made.reasons
        if made.layer is None:
            own[LOWERED] = FloatLayer(
                weight=qtensor.from_quantizer(weight, quantizers["weights"])
                if "weights" in quantizers
                else None,
                inputs={k: q for k, q in quantizers.items() if k != "weights"},
            )
        else:
            own[LOWERED] = made.layer
            folded |= {made.norm.path} if made.norm is not None else set()
            if "bias" in own:
                biases.append((path, own["bias"].shape[len(layer.stack) :], own["bias"].dtype))
            own.pop("bias", None)
            largest[path] = made.bound
            for operand in made.layer.inputs:
                grids[path, operand] = quantizers[operand]
        if "weights" in quantizers:
            del own[layer.weight_name]
            weights.append((path, layer.weight_name, weight.shape, weight.dtype))
    for norm in folded:
        in_float.pop(norm, None)
    static = _Static(
        model=model,
        grids=tuple(_numbered(grids).items()),
        largest=tuple(largest.items()),
        weights=tuple(weights),
        biases=tuple(biases),
        folded=frozenset(folded),
        in_float=tuple(in_float.items()),
        fixed_point=fixed_point,
    )
    return IntegerModel(
        variables={**variables, "params": params},
        keywords=Inputs(**apply_kwargs),
        biases=rounded,
        static=static,
    )


class _Made(NamedTuple):
    """What became of a layer."""

    layer: IntegerLayer | None  # None: it computes in float
    reasons: dict[str, str]  # why: of the layer, or of the norm behind it
    bound: int = 0  # of its sums
    norm: Norm | None = None  # the batch norm that is part of it
    rounded: tuple[Rounded | None, ...] = ()  # its bias; of each layer of a stack


def _structure(model: nn.Module, variables: Variables, inputs: Inputs) -> tuple:
    """Returns what `_traced_structure` lists, once for a model and shapes."""
    shaped = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), getattr(x, "dtype", jnp.result_type(x)))
    leaves, structure = jax.tree.flatten((variables, inputs))
    arguments = (model, structure, tuple(map(shaped, leaves)))
    try:
        hash((model, structure))
    except TypeError:  # it has a field that is a list
        return _traced_structure.__wrapped__(*arguments)
    return _traced_structure(*arguments)


@functools.lru_cache(maxsize=16)
def _traced_structure(model: nn.Module, structure: Any, leaves: tuple) -> tuple:
    """`(layers, what no rule reaches, code of the layers' calls, norms to fold)`."""
    variables, inputs = jax.tree.unflatten(structure, leaves)
    layers = list_layers(model, variables, inputs)
    return (
        layers,
        list_unquantized(model, variables, inputs),
        list_code(model, variables, inputs),
        foldable(model, variables, inputs, layers),
    )


def _make_layers(
    model: nn.Module, variables: Variables, qparams: QParams, inputs: Inputs
) -> dict[str, _Made]:
    """What becomes of each layer that `qparams` quantize, by path."""
    layers, unquantized, calls, norms = _structure(model, variables, inputs)
    for path in qparams:
        if path in unquantized:
            raise ValueError(
                f"qparams quantize {path!r}, which must stay in float: {unquantized[path]}; "
                "calibrate anew"
            )
        if path not in layers:
            raise unknown_layer("qparams", path, variables.get("params", {}))
    layered = {}
    for path, quantizers in qparams.items():
        params = copied(dict(variables.get("params", {})), path, "qparams")
        norm, reasons, made = norms.get(path), {}, None
        arguments = (layers[path], params, quantizers, calls[path])
        if norm is not None:
            try:
                made = _integer(*arguments, norm, variables)
            except Unsupported as error:  # perhaps without it
                reasons[norm.path] = f"{error}, with the norm in it"
        if made is None:
            try:
                made = _integer(*arguments, None, variables)._replace(reasons=reasons)
            except Unsupported as error:
                made = _Made(None, {path: str(error)})
        layered[path] = made
    return layered


def _numbered(grids: Mapping[tuple[str, str], Quantizer]) -> dict[tuple[str, str], int]:
    """The same number for the same grid; a stack of layers has one of its own."""
    numbers: dict[Any, int] = {}
    found = {}
    for key, quantizer in grids.items():
        same = tuple(
            np.asarray(getattr(quantizer, name)).tobytes()
            for name in ("scale", "zero_point", "qmin", "qmax")
        )
        same = (key if np.ndim(quantizer.qmin) else same, quantizer.scale_format)
        found[key] = numbers.setdefault(same, len(numbers))
    return found


def _integer(
    layer: LayerInfo,
    own: Mapping[str, Any],
    quantizers: Mapping[str, Quantizer],
    calls: list[LayerCode | str],
    norm: Norm | None,
    variables: Variables,
) -> _Made:
    """The integer layer, of a stack if it is one."""
    if not calls:
        raise Unsupported("it looks up rows, which become floats, and multiplies nothing")
    if reasons := [call for call in calls if isinstance(call, str)]:
        raise Unsupported(reasons[0])
    wanted = [*layer.operands, *(["weights"] if layer.weight_name else [])]
    floats = [name for name in wanted if name not in quantizers]
    if floats:
        raise Unsupported(f"no rule quantizes its {' and '.join(floats)}")
    inputs = {name: qtensor.input_grid(quantizers[name]) for name in layer.operands}
    weight = bias = None
    if layer.weight_name:
        weight = qtensor.from_quantizer(own[layer.weight_name], quantizers["weights"])
        bias = None if "bias" not in own else np.asarray(own["bias"], np.float64)
    factor, offset = (None, None) if norm is None else norms_lib.affine(norm, variables)
    found = []
    for index in np.ndindex(layer.stack):
        one = lambda tree, index=index: jax.tree.map(lambda a: a[index] if index else a, tree)
        parts = map(one, (inputs, weight, bias, factor, offset))
        found.append(_integer_one(layer, calls, *parts, norm))
    made, bounds, rounded = zip(*found, strict=True)
    whole = made[0]
    if layer.stack:
        whole = jax.tree.map(lambda *a: jnp.stack(a).reshape(*layer.stack, *a[0].shape), *made)
    return _Made(whole, {}, max(bounds), norm, rounded)


def _integer_one(layer, calls, inputs, weight, bias, factor, offset, norm):
    """The integer layer of one of a stack, and what `integer_layer.make` returns with it."""
    if norm is not None:
        channels = output_channels(layer)
        if not set(norm.axes) <= set(channels):
            raise Unsupported(f"the norm's axes {norm.axes} are no output channels")
        axes = [channels[axis] for axis in norm.axes]
        weight = qtensor.scaled(weight, spread(factor, axes, len(layer.weight_shape)))
        if bias is not None:
            aligned = lambda values: of_bias(values, norm, layer, bias.ndim)
            bias, offset = bias * aligned(factor) + aligned(offset), None
        else:
            offset = spread(offset, norm.axes, len(layer.output_shape))
    made = [
        integer_layer.make(call.code, call.roles, inputs, weight, bias, offset) for call in calls
    ]
    if len({str(jax.tree.map(jnp.shape, one)) for one, *_ in made}) > 1:
        raise Unsupported("it is called with inputs of several ranks")
    return made[0]


def _integer_call(static: _Static, module_call: ModuleCall) -> Any:
    """A handler: layers compute with what they were lowered to."""
    module, method, path = module_call.module, module_call.method, module_call.path
    args, kw, kind = module_call.args, module_call.kwargs, module_call.kind
    if method == "__call__" and path in static.folded:
        return module_call.argument(0, "x")
    if kind is None or not module.has_variable("params", LOWERED):
        return module_call.run()
    lowered = module.get_variable("params", LOWERED)
    if not kind.methods[method]:
        return _look_up(lowered, module, args, kw)
    if isinstance(lowered, FloatLayer):
        return _float_call(lowered, module, method, args, kw)
    params = {}
    if lowered.weight is not None:
        dtypes = {layer: dtype for layer, _, _, dtype in static.weights}
        params[kind.weight] = jax.ShapeDtypeStruct(lowered.weight.shape, dtypes[path])
    for layer, shape, dtype in static.biases:
        if layer == path:
            params["bias"] = jax.ShapeDtypeStruct(shape, dtype)
    code = layer_code(module, method, args, kw, params)
    numbers = dict(static.grids)
    call = LayerCall(
        path=path,
        traced=code.code,
        roles=code.roles,
        operands=code.operands,
        grids=tuple(numbers[path, operand] for operand in code.operands),
        structure=jax.tree.structure(lowered),
        largest=dict(static.largest)[path],
    )
    inputs = [kinds.argument(args, kw, place) for place in kinds.operands(module, method).values()]
    return network.call_layer(call, lowered, inputs)


def _look_up(
    lowered: FloatLayer | IntegerLayer, module: nn.Embed, args: tuple, kw: Mapping[str, Any]
) -> Array:
    """The rows of a table, of which only those asked for become floats."""
    rows = primitives.rows(lowered.weight, kinds.argument(args, kw, (0, "inputs")))
    return rows if module.dtype is None else rows.astype(module.dtype)


def _float_call(
    lowered: FloatLayer, module: nn.Module, method: str, args: tuple, kw: Mapping[str, Any]
) -> Any:
    """A layer that computes in float, with the weight that its codes stand for."""
    kind = kinds.kind_of(module)
    for name, place in kinds.operands(module, method).items():
        if name in lowered.inputs:
            value = fake_quantize(kinds.argument(args, kw, place), lowered.inputs[name])
            args, kw = kinds.replace_argument(args, kw, place, value)
    variables = dict(module.variables)
    params = {k: v for k, v in variables.get("params", {}).items() if k != LOWERED}
    if lowered.weight is not None:
        params[kind.weight] = primitives.weight(lowered.weight)
    free = module.clone(parent=None, name=None)
    return free.apply({**variables, "params": params}, *args, method=method, **kw)
