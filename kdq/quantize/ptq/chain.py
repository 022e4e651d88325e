"""Methods of post-training quantization, one after another, with calibration among them."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from kdq.fields import ConfigError, check_arguments, unknown
from kdq.quantize.calibrate import calibrate
from kdq.quantize.ptq.bias_correction import bias_correction
from kdq.quantize.ptq.fold_batch_norm import fold_batch_norm
from kdq.quantize.ptq.reestimate import reestimate
from kdq.quantize.rules import QuantizationRule
from kdq.types import Array, QParams, Variables

Progress = Callable[[Iterable, str], Iterable]

# They change the float weights, and calibration comes after them.
BEFORE = {f.__name__: f for f in (fold_batch_norm,)}
# They start from calibrated quantizers.
AFTER = {f.__name__: f for f in (reestimate, bias_correction)}
METHODS = {**BEFORE, **AFTER}

# What the chain itself gives to a method; the rest of its keywords are options.
GIVEN = ("model", "variables", "qparams", "batches", "apply_kwargs", "progress", "teacher")


def check(steps: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises ConfigError for a chain that `run` would refuse.

    Args:
      steps: `{"method": a key of METHODS, **its options}`, those of BEFORE first.
      where: the config key, for the error.
    """
    calibrated = False
    for i, step in enumerate(steps):
        here = f"{where}[{i}]"
        options = dict(step)
        name = options.pop("method", None)
        if name not in METHODS:
            raise ConfigError(unknown(f"{here}.method:", name, METHODS))
        if name in BEFORE and calibrated:
            raise ConfigError(
                f"{here}: {name!r} changes float weights and must come before {tuple(AFTER)}"
            )
        calibrated = calibrated or name in AFTER
        for given in GIVEN:
            if given in options:
                raise ConfigError(f"{here}.{given}: not an option of {name!r}")
        check_arguments(METHODS[name], options | dict.fromkeys(_required(name)), here)


def run(
    steps: Sequence[Mapping[str, Any]],
    model: nn.Module,
    variables: Variables,
    rules: Sequence[QuantizationRule],
    batches: Sequence[Array | tuple],
    *,
    teacher: Callable[[Array | tuple], Array] | None = None,
    progress: Progress | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Variables, QParams]:
    """Calibrated and improved: what comes before calibration, calibration, what comes after.

    Args:
      steps: see `check`; () only calibrates.
      model: any Linen module.
      variables: its float variables.
      rules: see `kdq.quantize.rules`.
      batches: a few hundred unlabelled examples as inputs of the model, all of one shape.
      teacher: inputs -> logits, for methods that ask one; None is the float model itself.
      progress: a bar for each method.
      apply_kwargs: passed to the model, e.g. {"train": False}.

    Returns:
      Variables whose quantized weights lie on their grids where a method chose the rounding, and
      the quantizers.
    """
    check(steps, "steps")
    qparams: QParams = {}
    apply_kwargs = dict(apply_kwargs or {})
    shared = {"apply_kwargs": apply_kwargs, "teacher": teacher, "progress": progress}
    for step in [*_of(steps, BEFORE), None, *_of(steps, AFTER)]:
        if step is None:
            qparams = calibrate(model, variables, rules, batches, **apply_kwargs)
            continue
        options = dict(step)
        method = METHODS[options.pop("method")]
        takes = inspect.signature(method).parameters
        given = {k: v for k, v in shared.items() if k in takes and v is not None}
        variables, qparams = method(model, variables, qparams, batches, **given, **options)
    return variables, qparams


def _of(steps: Sequence[Mapping[str, Any]], methods: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [step for step in steps if step["method"] in methods]


def _required(name: str) -> list[str]:
    """The parameters of a method that have no default."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty]
