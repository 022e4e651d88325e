"""Methods of post-training quantization, one after another, with calibration among them."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from kdq.fields import ConfigError, check_arguments, unknown
from kdq.quantize.calibrate import calibrate
from kdq.quantize.inputs import Batch
from kdq.quantize.network import Network, as_network
from kdq.quantize.ptq.adaround import adaround
from kdq.quantize.ptq.awq import awq
from kdq.quantize.ptq.bias_correction import bias_correction
from kdq.quantize.ptq.brecq import brecq
from kdq.quantize.ptq.equalize import equalize
from kdq.quantize.ptq.fold_batch_norm import fold_batch_norm
from kdq.quantize.ptq.gptq import gptq
from kdq.quantize.ptq.options import Progress, quiet
from kdq.quantize.ptq.reestimate import reestimate
from kdq.quantize.ptq.smooth import smooth
from kdq.quantize.ptq.teacher_guided import teacher_guided
from kdq.quantize.rules import QuantizationRule
from kdq.types import Array, QParams, Variables

# They change the float weights and leave the function as it is; calibration comes after them.
BEFORE = {f.__name__: f for f in (fold_batch_norm, equalize, smooth, awq)}
# They start from calibrated quantizers.
AFTER = {
    f.__name__: f for f in (adaround, brecq, gptq, teacher_guided, reestimate, bias_correction)
}
METHODS = {**BEFORE, **AFTER}
# Options with which a method compares outputs by their KL: as logits of one distribution.
BY_DIVERGENCE = {"teacher_guided": {}, "brecq": {"fisher": True}}

# What the chain itself gives to a method; the rest of its keywords are options.
GIVEN = {
    *("network", "variables", "qparams", "batches", "progress"),
    *("rules", "target", "teacher"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A quantized model, and the float model that it should do as."""

    target: Variables  # float: the function of the model as it was, folded and rescaled
    variables: Variables
    qparams: QParams


def check(steps: Sequence[Mapping[str, Any]], where: str, *, categorical: bool = True) -> None:
    """Raises ConfigError for a chain that `run` would refuse.

    Args:
      steps: `{"method": a key of METHODS, **its options}`, those of BEFORE first.
      where: the config key, for the error.
      categorical: whether the model's outputs are logits of one distribution.
    """
    calibrated = False
    for i, step in enumerate(steps):
        here = f"{where}[{i}]"
        options = dict(step)
        name = options.pop("method", None)
        if name not in METHODS:
            raise ConfigError(unknown(f"{here}.method:", name, METHODS))
        if (
            not categorical
            and name in BY_DIVERGENCE
            and BY_DIVERGENCE[name].items() <= step.items()
        ):
            raise ConfigError(
                f"{here}: {name!r} compares logits of classes by their KL, which this task's "
                "outputs are not"
            )
        if name in BEFORE and calibrated:
            raise ConfigError(
                f"{here}: {name!r} changes float weights and must come before {tuple(AFTER)}"
            )
        calibrated = calibrated or name in AFTER
        for option in GIVEN:
            if option in options:
                raise ConfigError(f"{here}.{option}: not an option of {name!r}")
        parameters = inspect.signature(METHODS[name]).parameters.values()
        required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
        check_arguments(METHODS[name], options | dict.fromkeys(required), here)


def run(
    steps: Sequence[Mapping[str, Any]],
    network: Network | nn.Module,
    variables: Variables,
    rules: Sequence[QuantizationRule],
    batches: Sequence[Batch],
    *,
    teacher: Callable[[Batch], Array] | None = None,
    progress: Progress = quiet,
) -> Outcome:
    """Calibrated and improved: what comes before calibration, calibration, what comes after.

    Args:
      steps: see `check`; () only calibrates.
      network: any Linen module, or a `Network`.
      variables: its float variables.
      rules: see `kdq.quantize.rules`.
      batches: a few hundred unlabelled examples as inputs of the model, all of one shape.
      teacher: inputs -> logits, for methods that ask one; None is the float model itself.
      progress: a bar for each method.

    Returns:
      Variables whose quantized weights lie on their grids where a method chose the rounding, the
      quantizers, and the float model that both are to be compared with.
    """
    check(steps, "steps")
    network, shared = as_network(network), {"progress": progress}

    def go(step: Mapping[str, Any], variables: Variables, qparams: QParams, **more: Any):
        options = dict(step)
        method = METHODS[options.pop("method")]
        takes = inspect.signature(method).parameters
        options |= {k: v for k, v in (shared | more).items() if k in takes}
        return method(network, variables, qparams, batches, **options)

    for step in (step for step in steps if step["method"] in BEFORE):
        variables, _ = go(step, variables, {}, rules=rules)
    target = variables
    qparams = calibrate(network, variables, rules, batches, check=False)
    for step in (step for step in steps if step["method"] in AFTER):
        variables, qparams = go(step, variables, qparams, target=target, teacher=teacher)
    return Outcome(target=target, variables=variables, qparams=qparams)
