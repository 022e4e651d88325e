"""A network as everything in kdq takes it: a module with how it is called, and its weights."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict

from kdq.quantize import simulate
from kdq.quantize.calls import Handler
from kdq.quantize.inputs import Batch, Inputs, as_inputs, unboxed
from kdq.quantize.simulate import Rounding
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

# Arguments by which modules are told whether they train, and their values where they do.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
PREDICTIONS = ("logits", "prediction", "predictions", "output", "outputs")  # names of that part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The arrays a network computes with: float variables and quantizers ({} for none)."""

    variables: Variables
    qparams: QParams


@dataclasses.dataclass(frozen=True)
class Network:
    """A module and how it is called. Hashable if the module is: a static argument of `jit`.

    Whether the module trains is an argument of each call here, `train`. The signature of the
    module's method says by which argument it takes that: see `MODES`; many modules take none.

    Attributes:
      module: any Linen module.
      kwargs: further keyword arguments of every call, hashable. Arrays belong to the `Inputs`.
      prediction: the key, field or position of the part of the outputs that is the prediction.
        None: the outputs themselves if they are one array; of a dict or a dataclass what is named
        as one of `PREDICTIONS`; of a tuple its first array.
    """

    module: nn.Module
    kwargs: Mapping[str, Any] = FrozenDict()
    prediction: str | int | None = None

    def __post_init__(self):
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"expected a flax.linen.Module, got {self.module!r}")
        object.__setattr__(self, "kwargs", FrozenDict(self.kwargs))

    def arguments(self, inputs: Batch, *, train: bool = False, **kwargs: Any) -> Inputs:
        """The arguments of a call of the module.

        Args:
          inputs: an array, a tuple of positional arguments, a dict or another pytree, which is one
            argument, or `Inputs`.
          train: whether it trains. What `inputs`, or `kwargs` of the network, say goes before this.
          **kwargs: further keyword arguments of this call.

        Raises:
          TypeError: a keyword argument is given twice.
        """
        args, own_kwargs = as_inputs(inputs).unpack()
        for more in (self.kwargs, kwargs):
            if twice := sorted(own_kwargs.keys() & more.keys()):
                raise TypeError(f"the batch has {twice} by keyword already: give them once")
            own_kwargs |= more
        method = own_kwargs.get("method") or "__call__"
        function = getattr(type(self.module), method) if isinstance(method, str) else method
        mode = {
            name: train == value
            for name, position, default in _mode_parameters(function)
            for value in [MODES[name]]
            # Flax refuses an argument that is a field of the module too.
            if position >= len(args) and getattr(self.module, name, None) is None
            if default is not (train == value)
        }
        return Inputs(*args, **mode | own_kwargs)

    def init(self, rngs: Any, inputs: Batch, *, train: bool = False) -> Variables:
        """Draws variables of the module: `module.init` with a key, or with keys by name."""
        args, kwargs = self.arguments(inputs, train=train).unpack()
        return self.module.init(rngs, *args, **kwargs)

    def apply(
        self,
        weights: Weights,
        inputs: Batch,
        *,
        train: bool = False,
        freeze_norm: bool = False,
        rounding: Rounding = fake_quantize,
        **kwargs: Any,
    ) -> Any:
        """`module.apply(variables, inputs, ...)` with the layers in `qparams` quantized.

        Args:
          weights: the variables, unchanged by this, and the quantizers `{path: {"weights":
            quantizer, "activations": quantizer}}`, either half optional.
          inputs: see `arguments`.
          train: whether the module trains.
          freeze_norm: whether batch norm uses its running statistics, and keeps them, in training
            too.
          rounding: what a tensor becomes by its quantizer.
          **kwargs: passed to `module.apply` (`mutable`, `rngs`, a mask, ...).

        Returns:
          The outputs; with `mutable`, `(outputs, collections)`.

        Raises:
          KeyError: `qparams` name a layer that `variables` do not have.
        """
        call = self.arguments(inputs, train=train, **kwargs)
        variables = unboxed(weights.variables)
        options = {"freeze_norm": freeze_norm, "rounding": rounding}
        outputs, collections = simulate.run(
            self.module, variables, weights.qparams, call, **options
        )
        return outputs if call.kwargs.get("mutable", False) is False else (outputs, collections)

    def run(
        self,
        weights: Weights,
        inputs: Batch,
        *handlers: Handler,
        train: bool = False,
        mutable: Iterable[str] = (),
    ) -> tuple[Any, dict[str, Any]]:
        """`(outputs, collections)`, with handlers of layers' calls.

        Handlers see the inputs of layers as these are rounded; see `calls.run`. The variables are
        to be unboxed.
        """
        call = self.arguments(inputs, train=train)
        variables, qparams = weights.variables, weights.qparams
        return simulate.run(self.module, variables, qparams, call, *handlers, mutable=mutable)

    def select_prediction(self, outputs: Any) -> Array:
        """The part of the module's outputs that is the prediction; see `prediction`.

        Raises:
          ValueError: there is no such part, or none is known.
        """
        if isinstance(outputs, Mapping):
            parts = dict(outputs)
        elif dataclasses.is_dataclass(outputs) or hasattr(outputs, "_asdict"):
            names = getattr(outputs, "_fields", None) or [
                field.name for field in dataclasses.fields(outputs)
            ]
            parts = {name: getattr(outputs, name) for name in names}
        elif isinstance(outputs, tuple | list):
            parts = dict(enumerate(outputs))
        elif self.prediction is None:
            return outputs
        else:
            raise ValueError(f"prediction={self.prediction!r}: the outputs are one array")
        key = self.prediction
        if key is None:
            is_array = lambda part: hasattr(part, "shape") and hasattr(part, "dtype")
            names = [k for k in (*PREDICTIONS, *range(len(parts))) if is_array(parts.get(k))]
            key = names[0] if names else None
        if key not in parts:
            raise ValueError(
                f"prediction={self.prediction!r}: expected one of {list(parts)}, the parts of the "
                "module's outputs: give it to Network"
            )
        return parts[key]


def as_network(network: Network | nn.Module) -> Network:
    """A network; of a bare module, one that is called in the way that its signature says."""
    return network if isinstance(network, Network) else Network(network)


@functools.lru_cache(maxsize=256)
def _mode_parameters(function: Callable) -> tuple[tuple[str, float, Any], ...]:
    """`(name, position without self, default)` of the parameters that `MODES` names."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return tuple(
        (p.name, float("inf") if p.kind is p.KEYWORD_ONLY else position, p.default)
        for position, p in enumerate(parameters)
        if p.name in MODES and p.kind is not p.POSITIONAL_ONLY
    )


def apply(
    network: Network | nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Batch,
    /,
    **kwargs: Any,
) -> Any:
    """`Network.apply` of variables and quantizers, {} for the float model; see there."""
    weights = Weights(variables=variables, qparams=qparams)
    return as_network(network).apply(weights, inputs, **kwargs)


@functools.partial(jax.jit, static_argnames=("network",))
def predict(
    network: Network | nn.Module, variables: Variables, qparams: QParams, inputs: Batch
) -> Array:
    """`apply` in evaluation mode, compiled once for a model and a set of quantized layers."""
    return apply(network, variables, qparams, inputs)
