"""One run of a Linen module with handlers around the calls of its layers.

`run` is the one place that looks at layers or puts others in their place. Besides it methods are
intercepted where a training step computes them otherwise (`kdq.train.step`, `convolution`), and
where `module.init` is traced (`kdq.deploy.formats.fitting`).
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
from flax.core.scope import union_filters

from kdq.models import Product
from kdq.quantize import kinds
from kdq.quantize.inputs import Inputs
from kdq.quantize.kinds import Kind, kind_of
from kdq.quantize.paths import path_of
from kdq.types import Variables


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """A call of a method of a bound module, before it is made."""

    function: Callable  # the method, or the next handler
    args: tuple
    kwargs: Mapping[str, Any]
    module: nn.Module
    method: str

    @property
    def path(self) -> str:
        """The module's path, joined by "/"."""
        return path_of(self.module)

    @property
    def kind(self) -> Kind | None:
        """The kind of layer whose computation this is; None for any other module or method."""
        kind = kind_of(self.module)
        return kind if kind and self.method in kind.methods else None

    @property
    def operands(self) -> dict[str, Any]:
        """The inputs that can be quantized, by name; {} if this is no layer."""
        places = kinds.operands(self.module, self.method)
        return {name: self.argument(*place) for name, place in places.items()}

    def argument(self, position: int, keyword: str) -> Any:
        """The argument at a position or by its keyword."""
        return kinds.argument(self.args, self.kwargs, (position, keyword))

    def with_operands(self, **values: Any) -> "ModuleCall":
        """The same call with other inputs."""
        args, kwargs = self.args, self.kwargs
        for name, place in kinds.operands(self.module, self.method).items():
            if name in values:
                args, kwargs = kinds.replace_argument(args, kwargs, place, values[name])
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def run(self) -> Any:
        """Makes the call; returns the outputs."""
        return self.function(*self.args, **self.kwargs)


Handler = Callable[[ModuleCall], Any]  # makes the call, or another in its place: its outputs


def run(
    module: nn.Module,
    variables: Variables,
    inputs: Inputs,
    *handlers: Handler,
    mutable: Iterable[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """`(outputs, collections)` of a call of a module just as `inputs` say.

    The last handler is asked first. `mutable` are collections to return as the module left them;
    those of the inputs only let it run. The variables are unboxed.
    """
    args, kwargs = inputs.unpack()
    filters = union_filters(kwargs.pop("mutable", False), list(mutable))
    with contextlib.ExitStack() as stack:
        for handler in (_name_products, *handlers):
            stack.enter_context(nn.intercept_methods(partial(_intercept, handler)))
        return module.apply(variables, *args, mutable=filters, **kwargs)


def _intercept(
    handler: Handler, function: Callable, args: tuple, kwargs: dict[str, Any], context: Any
) -> Any:
    return handler(ModuleCall(function, args, kwargs, context.module, context.method_name))


def _name_products(call: ModuleCall) -> Any:
    """Gives products that Flax makes without a layer a layer, and so a path.

    Those of attention are "qk" and "av": Flax lets the module be told how to multiply
    (`qk_attn_weights_einsum_cls`); a bound module belongs to this one call, so nothing outlives it.
    `OptimizedLSTMCell` joins the kernels of `LSTMCell`, which has the same parameters, to multiply
    once: it is run as that.
    """
    module = call.module
    if call.method == "__call__" and type(module) is nn.OptimizedLSTMCell:
        # Unwrapped: this is a call of the module already, which would be intercepted again.
        return inspect.unwrap(nn.LSTMCell.__call__)(module, *call.args, **call.kwargs)
    if (
        call.method == "__call__"
        and isinstance(module, nn.MultiHeadDotProductAttention)
        and module.qk_attn_weights_einsum_cls is None
        and not kinds.why_not(module)
    ):
        for field, name in (
            ("qk_attn_weights_einsum_cls", "qk"),
            ("attn_weights_value_einsum_cls", "av"),
        ):
            object.__setattr__(module, field, partial(Product, name=name))
    return call.run()
