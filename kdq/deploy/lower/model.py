"""A model whose layers multiply integers."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend import core

from kdq.deploy import primitives
from kdq.deploy.flow.layer import LayerCall, call_layer
from kdq.deploy.flow.run import run as run_flow
from kdq.deploy.lower.trace import trace_layer
from kdq.deploy.qtensor import QTensor
from kdq.quantize.calls import ModuleCall
from kdq.quantize.grid import Quantizer
from kdq.quantize.inputs import Batch, Inputs, as_inputs, reboxed, unboxed
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import copied
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, Variables

# Where a layer finds what it computes with: in "params", which Linen's lifted transforms slice.
LOWERED = "_lowered"


class FloatLayer(flax.struct.PyTreeNode):
    """A layer that multiplies floats: its weight is kept as codes if it was quantized."""

    weight: QTensor | None
    inputs: dict[str, Quantizer]  # what its inputs are rounded by


@dataclasses.dataclass(frozen=True)
class StaticLayer:
    """The static part of a lowered layer."""

    weight: tuple[str, jax.ShapeDtypeStruct] | None = None  # its name, and what it was as floats
    bias: jax.ShapeDtypeStruct | None = None  # of an integer layer
    grids: tuple[tuple[str, int], ...] = ()  # of its operands: equal numbers, equal grids
    largest: int = 0  # a bound of its sums


@dataclasses.dataclass(frozen=True)
class Static:
    """The static part of an integer model."""

    network: Network
    layers: tuple[tuple[str, StaticLayer], ...]  # those that are quantized, by path
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
    static: Static = flax.struct.field(pytree_node=False)

    @property
    def in_float(self) -> dict[str, str]:
        """The modules that compute in float, by path, with the reason."""
        return dict(self.static.in_float)

    def simulated(self, variables: Variables) -> Variables:
        """Returns `variables`, those that were lowered, with the biases that this model adds.

        A bias of an integer layer is an int32 at the scale of its sums, at few bits coarse enough
        to move codes. Simulated with these variables, every layer gets the codes that this model
        has. Where a batch norm is part of a layer without a bias, it is the norm's that changes.
        """
        changed = unboxed(variables)
        params = dict(changed.get("params", {}))
        for path, bias in self.biases.items():
            copied(params, path, "the integer model's biases")["bias"] = bias
        return reboxed({**changed, "params": params}, variables)

    def __call__(self, inputs: Batch) -> Array:
        """Returns the outputs in evaluation mode; compiled once for a shape."""
        return _predict(self, inputs)

    def apply(
        self,
        inputs: Batch,
        *,
        unroll: bool = False,
        integers: dict[str, Array] | None = None,
    ) -> Array:
        """Returns the same, to be traced by a function of yours.

        Args:
          inputs: an array, a tuple of positional arguments, another pytree of arrays that is one
            argument, or `quantize.Inputs`, whose keywords replace those that `lower` got.
          unroll: write each layer of a scanned stack out.
          integers: gets the uint8 codes that each integer layer takes, as PATH/activations (and
            PATH/other), and what it makes of them, as PATH: uint8 codes of the next grid, or int32
            sums. Of a later call of a layer PATH is PATH#2, ... Layers of a stack are in it if they
            are unrolled.
        """
        traced, structure, leaves = self.trace(inputs)
        integers, fixed_point = {} if integers is None else integers, self.static.fixed_point
        outputs = run_flow(
            traced, leaves, unroll=unroll, integers=integers, fixed_point=fixed_point
        )
        return jax.tree.unflatten(structure, outputs)

    def trace(self, inputs: Batch) -> tuple[core.ClosedJaxpr, Any, list[Array]]:
        """Returns the model with layers as equations, the tree of its outputs, its arguments.

        A layer is one equation, `flow.layer.layer_p`, between floats.
        """
        batch = as_inputs(inputs)
        call = Inputs(*batch.args, **{**self.keywords.kwargs, **batch.kwargs})
        forward = functools.partial(_forward, self.static)
        traced, shape = jax.make_jaxpr(forward, return_shape=True)(self.variables, call)
        return traced, jax.tree.structure(shape), jax.tree.leaves((self.variables, call))


@jax.jit
def _predict(lowered: IntegerModel, inputs: Batch) -> Array:
    return lowered.apply(inputs)


def _forward(static: Static, variables: Variables, inputs: Inputs) -> Any:
    # Modules with a `setup` ask for their weight when they are made. Nothing uses it.
    params = dict(variables["params"])
    for path, layer in static.layers:
        if layer.weight is not None:
            name, array = layer.weight
            copied(params, path, "weights")[name] = jnp.zeros(array.shape, array.dtype)
    weights = Weights(variables={**variables, "params": params}, qparams={})
    return static.network.run(weights, inputs, functools.partial(_call_lowered, static))[0]


def _call_lowered(static: Static, call: ModuleCall) -> Any:
    """Handles a call of a module: a layer computes with what it was lowered to."""
    if call.method == "__call__" and call.path in static.folded:
        return call.argument(0, "x")
    kind = call.kind
    if kind is None or not call.module.has_variable("params", LOWERED):
        return call.run()
    lowered = call.module.get_variable("params", LOWERED)
    if not kind.methods[call.method]:  # a table, of which only the rows asked for become floats
        dtype = call.module.dtype
        rows = primitives.rows(call.argument(0, "inputs"), lowered.weight)
        return rows if dtype is None else rows.astype(dtype)
    if isinstance(lowered, FloatLayer):
        return _call_in_float(lowered, call)
    layer = dict(static.layers)[call.path]
    params = {}
    if lowered.weight is not None:  # in a loop the layer is one of a stack
        params[kind.weight] = jax.ShapeDtypeStruct(lowered.weight.shape, layer.weight[1].dtype)
    if layer.bias is not None:
        params["bias"] = layer.bias
    code, numbers = trace_layer(call, params), dict(layer.grids)
    layer_call = LayerCall(
        **vars(code),
        path=call.path,
        grids=tuple(numbers[operand] for operand in code.operands),
        structure=jax.tree.structure(lowered),
        largest=layer.largest,
    )
    return call_layer(layer_call, lowered, list(call.operands.values()))


def _call_in_float(lowered: FloatLayer, call: ModuleCall) -> Any:
    """Calls a layer with its rounded inputs and weight."""
    quantizers = lowered.inputs
    rounded = {
        k: fake_quantize(x, quantizers[k]) for k, x in call.operands.items() if k in quantizers
    }
    call, variables = call.with_operands(**rounded), dict(call.module.variables)
    params = {k: v for k, v in variables.get("params", {}).items() if k != LOWERED}
    if lowered.weight is not None:
        params[call.kind.weight] = primitives.weight(lowered.weight)
    free = call.module.clone(parent=None, name=None)
    variables |= {"params": params}
    return free.apply(variables, *call.args, method=call.method, **call.kwargs)
