"""Lowering: a simulated model becomes one whose layers multiply integers."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from kdq import quantize
from kdq.deploy import integer_layer, network, primitives, qtensor
from kdq.deploy.contraction import BIAS, INPUT, OTHER, WEIGHT
from kdq.deploy.integer_layer import IntegerLayer, Rounded
from kdq.deploy.network import LayerCall
from kdq.deploy.qtensor import QTensor
from kdq.quantize import kinds, simulate
from kdq.quantize.grid import Quantizer
from kdq.quantize.kinds import Unsupported
from kdq.quantize.layers import LayerInfo, as_args, list_layers, list_unquantized, path_of
from kdq.quantize.ptq import norms as norms_lib
from kdq.quantize.ptq.norms import Norm, list_norms
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
    apply_kwargs: tuple[tuple[str, Any], ...]
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
    static: _Static = flax.struct.field(pytree_node=False)

    @property
    def in_float(self) -> dict[str, str]:
        """What computes in float, with the reason, by module path."""
        return dict(self.static.in_float)

    def __call__(self, inputs: Array | tuple) -> Array:
        """The outputs in evaluation mode; compiled once for a shape."""
        return _predict(self, inputs)

    def apply(
        self,
        inputs: Array | tuple,
        *,
        unroll: bool = False,
        made: dict[str, Array] | None = None,
    ) -> Array:
        """The same, to be traced by a function of yours.

        Args:
          inputs: an array, or a tuple of positional arguments.
          unroll: write each layer of a scanned stack out.
          made: gets the uint8 codes that each integer layer takes, as PATH/activations (and
            PATH/other), and what it makes of them, as PATH: uint8 codes of the next grid, or int32
            sums. Of a later call of a layer PATH is PATH#2, ... Layers of a stack are in it if they
            are unrolled.
        """
        arguments = as_args(inputs)
        traced, structure = _trace(self, arguments)
        leaves = jax.tree.leaves((self.variables, arguments))
        outputs = network.run(
            traced,
            leaves,
            unroll=unroll,
            made={} if made is None else made,
            fixed_point=self.static.fixed_point,
        )
        return jax.tree.unflatten(structure, outputs)

    def evaluate(self, inputs: Array | tuple, binder: Callable) -> Array:
        """The outputs with `binder(program)(eqn, values)` for each equation, to be traced.

        A layer is one equation, `network.layer_p`, between floats. Layers of a stack are unrolled.
        """
        arguments = as_args(inputs)
        traced, structure = _trace(self, arguments)
        leaves = jax.tree.leaves((self.variables, arguments))
        flat = network.inlined(traced, leaves, unroll=True)
        return jax.tree.unflatten(structure, network.evaluate(flat, leaves, binder(flat.jaxpr)))


@jax.jit
def _predict(lowered: IntegerModel, inputs: Array | tuple) -> Array:
    return lowered.apply(inputs)


def _trace(lowered: IntegerModel, arguments: tuple) -> tuple[core.ClosedJaxpr, Any]:
    static = lowered.static

    def forward(variables: Variables, arguments: tuple) -> Any:
        # Modules with a `setup` ask for their weight when they are made. Nothing uses it.
        params = dict(variables["params"])
        for path, name, shape, dtype in static.weights:
            simulate.copied(params, path, "weights")[name] = jnp.zeros(shape, dtype)
        with (
            nn.intercept_methods(kinds.name_products),
            nn.intercept_methods(functools.partial(_integer_call, static)),
        ):
            kwargs = dict(static.apply_kwargs)
            return static.model.apply({**variables, "params": params}, *arguments, **kwargs)

    traced, shape = jax.make_jaxpr(forward, return_shape=True)(lowered.variables, arguments)
    return traced, jax.tree.structure(shape)


def lower(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Array | tuple,
    *,
    fixed_point: bool = False,
    **apply_kwargs: Any,
) -> IntegerModel:
    """The integer model of a simulated one.

    Args:
      model: any Linen module.
      variables: its float variables.
      qparams: its quantizers.
      inputs: an array with a leading batch axis, or a tuple of positional arguments; only the
        shapes matter.
      fixed_point: multiply sums by a fixed-point number and shift, as microcontrollers do, rather
        than by a float32; and add sums as integers, as those of a residual block. A code may be
        the next one then.
      **apply_kwargs: passed to the model, in evaluation mode, e.g. `train=False`.

    Returns:
      The model. Its layers multiply codes where weight and input both have integers with fixed
      scales; `in_float` has the others and why. A batch norm behind such a layer becomes part of
      its scale and bias, without a change to its codes.

    Raises:
      KeyError: `qparams` name a layer that there is not.
    """
    kwargs, qparams = apply_kwargs, quantize.plain(qparams)
    layers, unquantized, _, _ = _structure(model, variables, inputs, kwargs)
    in_float = {path: "no rule quantizes it" for path in layers if path not in qparams}
    in_float |= unquantized
    params, folded = dict(variables["params"]), set()
    largest, grids, weights, biases = {}, {}, [], []
    for path, made in _make_layers(model, variables, qparams, inputs, kwargs).items():
        layer, quantizers = layers[path], qparams[path]
        own = simulate.copied(params, path, "qparams")
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
        apply_kwargs=tuple(sorted(kwargs.items())),
        grids=tuple(_numbered(grids).items()),
        largest=tuple(largest.items()),
        weights=tuple(weights),
        biases=tuple(biases),
        folded=frozenset(folded),
        in_float=tuple(in_float.items()),
        fixed_point=fixed_point,
    )
    return IntegerModel(variables={**variables, "params": params}, static=static)


def round_biases(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Array | tuple,
    **apply_kwargs: Any,
) -> Variables:
    """Variables whose biases are those of the integer model, to simulate just what it computes.

    A bias of an integer layer is an int32 at the scale of its sums, which at few bits is coarse
    enough to move codes. Where a batch norm becomes part of a layer without a bias, it is the
    norm's that changes. Arguments are those of `lower`.
    """
    kwargs, qparams = apply_kwargs, quantize.plain(qparams)
    layers = _structure(model, variables, inputs, kwargs)[0]
    params = dict(variables["params"])
    for path, made in _make_layers(model, variables, qparams, inputs, kwargs).items():
        if not any(made.rounded):
            continue
        own = simulate.copied(params, path, "qparams")
        of_norm, factor = {}, None
        if made.norm is not None:
            if norms_lib.params_of(made.norm, variables):
                of_norm = simulate.copied(params, made.norm.path, "variables")
            factor = norms_lib.affine(made.norm, variables)[0]
        for place, rounded in zip(np.ndindex(layers[path].stack), made.rounded, strict=False):
            if rounded is None:
                continue
            if rounded.index is not None:
                added = rounded.of_bias(own["bias"][place].shape)
                if factor is not None:
                    by = _of_bias(factor[place], made.norm, layers[path], added.ndim)
                    by = np.broadcast_to(by, added.shape)
                    added = np.divide(added, by, out=np.zeros_like(added), where=by != 0)
                own["bias"] = _plus(own["bias"], place, added)
            elif "bias" in of_norm and rounded.added.size == factor[place].size:
                added = rounded.added.reshape(factor[place].shape)
                of_norm["bias"] = _plus(of_norm["bias"], place, added)
    return {**variables, "params": params}


def _plus(array: Array, place: tuple[int, ...], added: np.ndarray) -> Array:
    """The array with something added to one of its stack."""
    total = np.array(array, np.float64)
    total[place] += added
    return jnp.asarray(total, array.dtype)


class _Made(NamedTuple):
    """What became of a layer."""

    layer: IntegerLayer | None  # None: it computes in float
    reasons: dict[str, str]  # why: of the layer, or of the norm behind it
    bound: int = 0  # of its sums
    norm: Norm | None = None  # the batch norm that is part of it
    rounded: tuple[Rounded | None, ...] = ()  # its bias; of each layer of a stack


def _structure(
    model: nn.Module, variables: Variables, inputs: Array | tuple, kwargs: Mapping[str, Any]
) -> tuple:
    """What `_traced_structure` finds, once for a model and shapes."""
    shaped = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    leaves, structure = jax.tree.flatten((variables, inputs))
    arguments = (model, structure, tuple(map(shaped, leaves)), tuple(sorted(kwargs.items())))
    try:
        hash(model)
    except TypeError:  # it has a field that is a list
        return _traced_structure.__wrapped__(*arguments)
    return _traced_structure(*arguments)


@functools.lru_cache(maxsize=16)
def _traced_structure(
    model: nn.Module, structure: Any, leaves: tuple, kwargs: tuple[tuple[str, Any], ...]
) -> tuple:
    """`(layers, what no rule reaches, code of the layers' calls, norms to fold)`."""
    variables, inputs = jax.tree.unflatten(structure, leaves)
    kwargs = dict(kwargs)
    layers = list_layers(model, variables, inputs, **kwargs)
    return (
        layers,
        list_unquantized(model, variables, inputs, **kwargs),
        _calls(model, variables, inputs, kwargs),
        _foldable(model, variables, inputs, layers, kwargs),
    )


def _make_layers(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Array | tuple,
    kwargs: Mapping[str, Any],
) -> dict[str, _Made]:
    """What becomes of each layer that `qparams` quantize, by path."""
    layers, _, calls, norms = _structure(model, variables, inputs, kwargs)
    for path in qparams:
        if path not in layers:
            raise simulate.unknown_layer("qparams", path, variables["params"])
    found = {}
    for path, quantizers in qparams.items():
        own = simulate.copied(dict(variables["params"]), path, "qparams")
        norm, reasons, made = norms.get(path), {}, None
        arguments = (layers[path], own, quantizers, calls[path])
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
        found[path] = made
    return found


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
    calls: list["_Traced"],
    norm: Norm | None,
    variables: Variables,
) -> _Made:
    """The integer layer, of a stack if it is one."""
    if not calls:
        raise Unsupported("it looks up rows, which become floats, and multiplies nothing")
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
        weight = qtensor.scaled(weight, _spread(factor, axes, len(layer.weight_shape)))
        if bias is not None:
            of_bias = lambda values: _of_bias(values, norm, layer, bias.ndim)
            bias, offset = bias * of_bias(factor) + of_bias(offset), None
        else:
            offset = _spread(offset, norm.axes, len(layer.output_shape))
    made = [
        integer_layer.make(call.code, call.roles, inputs, weight, bias, offset) for call in calls
    ]
    if len({str(jax.tree.map(jnp.shape, one)) for one, *_ in made}) > 1:
        raise Unsupported("it is called with inputs of several ranks")
    return made[0]


def _spread(values: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """`values`, one axis each for `axes` (negative) of an array of so many, aligned with it."""
    shape = [1] * rank
    values = values.transpose(np.argsort(axes))
    for size, axis in zip(values.shape, sorted(axes), strict=True):
        shape[axis] = size
    return values.reshape(shape)


def _of_bias(values: np.ndarray, norm: Norm, layer: LayerInfo, rank: int) -> np.ndarray:
    """What a norm has of each channel, aligned with the bias of the layer before it."""
    places = list(output_channels(layer))
    return _spread(values, [places.index(axis) - len(places) for axis in norm.axes], rank)


def _foldable(
    model: nn.Module,
    variables: Variables,
    inputs: Array | tuple,
    layers: Mapping[str, LayerInfo],
    kwargs: Mapping[str, Any],
) -> dict[str, Norm]:
    """{layer: the batch norm that is all that its output goes to}."""
    if "batch_stats" not in variables:
        return {}
    norms = {
        norm.source: norm
        for norm in list_norms(model, variables, inputs, **kwargs).values()
        if norm.source in layers and norm.stack == layers[norm.source].stack
    }
    behind = {norm.path for norm in norms.values()}

    def tag(next_fun: Callable, args: tuple, kw: dict, context: Any) -> Any:
        path = path_of(context.module)
        if context.method_name == "__call__" and path in behind:
            return kinds.argument(args, kw, (0, "x")) * 1.0  # one use, whatever a norm does
        outputs = next_fun(*args, **kw)
        if context.method_name == "__call__" and path in norms:
            return checkpoint_name(outputs, path)
        return outputs

    def forward(variables: Variables, *arguments: Any) -> Any:
        with nn.intercept_methods(kinds.name_products), nn.intercept_methods(tag):
            return model.apply(variables, *arguments, **kwargs)

    uses: collections.Counter[str] = collections.Counter()
    _count_uses(jax.make_jaxpr(forward)(variables, *as_args(inputs)).jaxpr, uses)
    return {path: norm for path, norm in norms.items() if uses[path] == 1}


@dataclasses.dataclass(frozen=True)
class _Traced:
    """The code of one call of a layer, in floats."""

    code: core.ClosedJaxpr
    roles: tuple[str, ...]  # of its arguments: inputs, weight, bias
    operands: tuple[str, ...]  # names of its inputs


def _layer_code(
    module: nn.Module,
    method: str,
    args: tuple,
    kwargs: Mapping[str, Any],
    params: Mapping[str, Any],
) -> _Traced:
    """The code of a call of a layer.

    Args:
      module: bound.
      method: its method.
      args: of the call.
      kwargs: of the call.
      params: its weight and bias by name, or their shapes.
    """
    kind, where = kinds.kind_of(module), kinds.operands(module, method)
    free = module.clone(parent=None, name=None)

    def forward(*values: Any) -> Any:
        call_args, call_kwargs = args, dict(kwargs)
        for place, value in zip(where.values(), values, strict=False):
            call_args, call_kwargs = kinds.replace_argument(call_args, call_kwargs, place, value)
        own = dict(zip(params, values[len(where) :], strict=True))
        return free.apply({"params": own}, *call_args, method=method, **call_kwargs)

    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    given = [kinds.argument(args, kwargs, place) for place in where.values()]
    code = jax.make_jaxpr(forward)(*map(shaped, given), *map(shaped, params.values()))
    roles = (*(INPUT, OTHER)[: len(where)], *(WEIGHT if n == kind.weight else BIAS for n in params))
    return _Traced(code, roles, tuple(where))


def _calls(
    model: nn.Module, variables: Variables, inputs: Array | tuple, kwargs: Mapping[str, Any]
) -> dict[str, list[_Traced]]:
    """The code of every call of every layer that multiplies."""
    found: dict[str, list] = collections.defaultdict(list)
    inside = []

    def record(next_fun: Callable, args: tuple, kw: dict, context: Any) -> Any:
        outputs = next_fun(*args, **kw)
        module, method = context.module, context.method_name
        kind = kinds.kind_of(module)
        if kind is None or method not in kind.methods or inside:
            return outputs
        calls = found[path_of(module)]
        if not kind.methods[method]:  # a lookup
            return outputs
        own = module.variables.get("params", {})
        params = {name: own[name] for name in (kind.weight, "bias") if name in own}
        inside.append(module)  # its code is a model of its own, which is intercepted too
        calls.append(_layer_code(module, method, args, kw, params))
        inside.clear()
        return outputs

    def forward(variables: Variables, *arguments: Any) -> Any:
        with nn.intercept_methods(kinds.name_products), nn.intercept_methods(record):
            return model.apply(variables, *arguments, **kwargs)

    jax.eval_shape(forward, variables, *as_args(inputs))
    return found


def _count_uses(jaxpr: core.Jaxpr, uses: collections.Counter) -> None:
    """How often each named array is used."""
    names = {
        eqn.outvars[0]: eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"
    }
    for eqn in jaxpr.eqns:
        uses.update(names[a] for a in eqn.invars if isinstance(a, core.Var) and a in names)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    _count_uses(inner.jaxpr, uses)
                elif isinstance(inner, core.Jaxpr):
                    _count_uses(inner, uses)
    uses.update(names[a] for a in jaxpr.outvars if isinstance(a, core.Var) and a in names)


def _integer_call(static: _Static, next_fun: Callable, args: tuple, kw: dict, context: Any) -> Any:
    """An interceptor: layers compute with what they were lowered to."""
    module, method, path = context.module, context.method_name, path_of(context.module)
    if method == "__call__" and path in static.folded:
        return kinds.argument(args, kw, (0, "x"))
    kind = kinds.kind_of(module)
    if kind is None or method not in kind.methods or not module.has_variable("params", LOWERED):
        return next_fun(*args, **kw)
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
    code = _layer_code(module, method, args, kw, params)
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
    params = {k: v for k, v in module.variables.get("params", {}).items() if k != LOWERED}
    if lowered.weight is not None:
        params[kind.weight] = primitives.weight(lowered.weight)
    free = module.clone(parent=None, name=None)
    return free.apply({"params": params}, *args, method=method, **kw)
