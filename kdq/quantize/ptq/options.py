"""The arguments that all methods take, and checks of their options."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp

from kdq.quantize.inputs import Batch, as_batches, reboxed, unboxed
from kdq.quantize.network import Network, as_network
from kdq.types import QParams, Variables

T = TypeVar("T")
# Wraps a loop under a description, as `kdq.data.sources.writing.track` does with a length.
Progress = Callable[[Iterable[T], str], Iterable[T]]
Method = Callable[..., tuple[Variables, QParams]]


def quiet(items: Iterable[T], description: str) -> Iterable[T]:
    """The progress that shows nothing."""
    return items


def ptq_method(*, before_calibration: bool = False) -> Callable[[Method], Method]:
    """Decorates a method of post-training quantization: all take and return the same.

    Args of every method, beside its own options:
      network: any Linen module, or a `Network`.
      variables: its float variables, boxed or not; unchanged.
      qparams: quantizers, from `calibrate`; {} for methods that come before it.
      batches: unlabelled inputs of the model, all of one shape; see `calibrate`.
      target: the float model's variables, where `variables` have been changed since; None:
        `variables`. Only methods that compare with it take it.
      progress: `progress(items, description)` yields the items; it may show a bar.

    Returns of every method: `(variables, qparams)`, in the boxes that they came in.

    Raises of every method:
      ValueError: no batches or an empty one, an option out of range, values that are not finite
        (names the layer), or quantizers for a method that comes before calibration.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def run(
            network: Network | nn.Module,
            variables: Variables,
            qparams: QParams,
            batches: Iterable[Batch],
            **options: Any,
        ) -> tuple[Variables, QParams]:
            if before_calibration and qparams:
                raise ValueError(
                    f"{method.__name__} changes weights, and so comes before calibrate: expected "
                    f"qparams={{}}, got those of {list(qparams)}"
                )
            if options.get("target") is not None:
                options["target"] = unboxed(options["target"])
            listed = list(as_batches(batches, method.__name__))
            plain = unboxed(variables)
            changed, qparams = method(as_network(network), plain, qparams, listed, **options)
            return reboxed(changed, variables), qparams

        return run

    return decorate


def check_positive(method: str, **options: float) -> None:
    """Raises ValueError for an option that is not above 0."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{method}: {name}={value!r}: expected more than 0")


def check_logits(name: str, what: str, logits: Any, like: tuple[int, ...] | None = None) -> None:
    """Raises ValueError unless `logits` is one float array, of the shape `like` if there is one."""
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if not shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: {what} must be one float array of logits, not {type(logits)}")
    if like is not None and shape != like:
        raise ValueError(f"{name}: {what} have shape {shape}, the model's have {like}")
