"""An arm's quantizers: calibrated, improved by post-training methods, made ready to train."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from kdq import config as kdq_config
from kdq import quantize
from kdq.config import Arm, ConfigError, Experiment
from kdq.experiment.progress import Progress
from kdq.fields import check_arguments, unknown
from kdq.quantize import QuantizationRule, TensorSpec, observers
from kdq.quantize.inputs import Batch
from kdq.quantize.network import Weights
from kdq.quantize.observers import Observer
from kdq.quantize.ptq import chain
from kdq.quantize.ptq.errors import layer_errors
from kdq.quantize.sqnr import warn_of_noise
from kdq.schema import Qat
from kdq.stopwatch import Stopwatch
from kdq.types import Array, Variables

log = logging.getLogger(__name__)

OBSERVERS = {
    "absmax": observers.AbsMax(),
    "min_max": observers.MinMax(),
    "moving_average": observers.MovingAverage(),
    "percentile": observers.Percentile(),
    "mse": observers.MSE(),
    "entropy": observers.Entropy(),
}


def quantized(
    experiment: Experiment,
    arm: Arm,
    model: nn.Module,
    variables: Variables,
    images: Sequence[Batch],
    *,
    guide: Callable[[Array], Array] | None,
    progress: Progress,
    categorical: bool = True,
) -> tuple[Weights, dict[str, Any]]:
    """Returns the weights that an arm with bits starts from, and what its record says of them.

    That is "calibration_seconds" and, apart from them, "compile_seconds"; with a chain of methods
    "ptq_errors": the signal to quantization noise ratio [dB] of each layer,
    {"layers": {path: [before, after]}}, and the KL [nats] of the output, {"kl": [before, after]},
    on `images`. None is a ratio without noise or signal.

    `images` are batches to calibrate on; `guide` is the teacher of methods that ask one, None the
    float model itself; `categorical` outputs are logits of one distribution, which have a KL.
    """
    rules = rules_of(experiment, arm)
    steps = experiment.ptq[arm.ptq] if arm.ptq else ()
    watch = Stopwatch()
    tell = progress.method
    start = chain.run(steps, model, variables, rules, images, teacher=guide, progress=tell)
    jax.block_until_ready((start.variables, start.qparams))
    fields: dict[str, Any] = {
        "calibration_seconds": watch.working,
        "compile_seconds": watch.compiling,
    }
    if steps:
        plain = quantize.calibrate(model, variables, rules, images, check=False)
        errors = layer_errors(
            model,
            variables,
            (variables, plain),
            (start.variables, start.qparams),
            images,
            target=start.target,
            progress=tell,
        )
        if not categorical:
            reason = "outputs are no logits of one distribution"
            errors = dataclasses.replace(errors, kl=None, reason=reason)
        log.info("%s, before and after:\n%s", arm.ptq, errors)
        fields["ptq_errors"] = errors.to_json()
    variables, qparams = start.variables, start.qparams
    if not arm.epochs:  # what is trained on is to be measured afterwards
        where = f"{arm.bits} by calibration"
        warn_of_noise(model, variables, qparams, images[0], target=start.target, where=where)
    else:
        method = recipe(experiment, arm).method
        variables, qparams = quantize.prepare(variables, qparams, method)
    return Weights(variables=variables, qparams=qparams), fields


def recipe(experiment: Experiment, arm: Arm) -> Qat:
    """Returns the recipe by which an arm's quantizers train."""
    return experiment.qat[arm.qat] if arm.qat else Qat()


def rules_of(experiment: Experiment, arm: Arm) -> tuple[QuantizationRule, ...]:
    """Which layers of an arm are quantized, and how. Raises ConfigError."""
    config, observer = experiment.quantize, OBSERVERS[arm.observer]
    if arm.bits in experiment.rules:
        where = f"config.rules.{arm.bits}"
        return rules_of_entries(experiment.rules[arm.bits], observer, where)
    return quantize.uniform_rules(
        *kdq_config.parse_bits(arm.bits),
        keep=config.keep,
        keep_bits=config.keep_bits,
        observer=observer,
    )


def rules_of_entries(
    entries: Sequence[Mapping[str, Any]], observer: Observer, where: str
) -> tuple[QuantizationRule, ...]:
    """The rules that a key of `config.rules` spells out. Raises ConfigError."""
    return tuple(_rule(entry, observer, f"{where}[{i}]") for i, entry in enumerate(entries))


def _rule(entry: Mapping[str, Any], observer: Observer, where: str) -> QuantizationRule:
    """A rule of the config, checked."""
    check_arguments(QuantizationRule, entry, where)
    halves = {}
    for half in entry.keys() - {"path"}:
        fields = {"observer": observer, **entry[half]}
        check_arguments(TensorSpec, fields, f"{where}.{half}")
        if isinstance(fields["observer"], str):
            if fields["observer"] not in OBSERVERS:
                name = fields["observer"]
                raise ConfigError(unknown(f"{where}.{half}.observer:", name, OBSERVERS))
            fields["observer"] = OBSERVERS[fields["observer"]]
        halves[half] = fields
    try:
        made = {half: TensorSpec(**fields) for half, fields in halves.items()}
        return QuantizationRule(path=entry["path"], **made)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
