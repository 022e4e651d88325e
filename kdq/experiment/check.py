"""What can be wrong with a config once the data are open: said before anything trains."""

import functools
import itertools
import logging
import math
import os
import re

import flax.linen as nn
import jax
import numpy as np

from kdq import processes, quantize
from kdq.config import ConfigError, Data, Experiment, unknown
from kdq.deploy import PackedFileError, PackedModel
from kdq.distill import capture
from kdq.distill.term import Shapes
from kdq.experiment.inputs import Inputs
from kdq.experiment.quantized import OBSERVERS, rules_of, rules_of_entries
from kdq.experiment.store import load
from kdq.experiment.teaching import Teachers
from kdq.quantize import qat
from kdq.quantize.ptq import chain
from kdq.quantize.rules import match
from kdq.train import objective, regime
from kdq.train.sharding import Layout
from kdq.types import Variables

log = logging.getLogger(__name__)

MOST_STEPS = 2**31 - 1  # which counters on the device hold


def check(
    experiment: Experiment,
    models: dict[str, nn.Module],
    inputs: Inputs,
    teachers: Teachers,
    layout: Layout,
) -> None:
    """Raises ConfigError for a config that the data, the layers or the teachers do not fit."""
    if inputs.augment and not inputs.splits["train"].is_images:
        name, shape = experiment.data.name, inputs.splits["train"].image_shape
        raise ConfigError(
            f"config.data.augment changes images, uint8 [height, width, channels]; {name} has "
            f"{inputs.splits['train'].dtype} {shape}"
        )
    _check_data(experiment.data, inputs)
    classes = inputs.splits["train"].num_classes
    for key, fields in experiment.models.items():
        if fields.get("num_classes", classes) != classes:
            raise ConfigError(
                f"config.models.{key}.num_classes={fields['num_classes']}, but "
                f"{experiment.data.name} has {classes} classes"
            )
        _check_size(models[key], inputs.image, f"config.models.{key}")
        _check_outputs(models[key], inputs.image, classes, f"config.models.{key}")
        _warn_of_script(fields["name"], f"config.models.{key}")
    _check_compute(experiment, models, inputs, layout)
    for name, arm in experiment.arms.items():
        if not set(arm.without_classes) <= set(range(classes)):
            raise ConfigError(
                f"config.arms.{name}.without_classes={arm.without_classes}: "
                f"{experiment.data.name} has the classes 0 to {classes - 1}"
            )
        if not len(inputs.ids(arm)):
            raise ConfigError(f"config.arms.{name}.without_classes leaves no example to train on")
        if inputs.steps(arm) > MOST_STEPS:
            raise ConfigError(
                f"config.arms.{name}.epochs={arm.epochs} are {inputs.steps(arm):.3g} steps of "
                f"{experiment.data.batch_size} examples; expected at most {MOST_STEPS}"
            )
        if arm.epochs and not inputs.last_step(arm):
            raise ConfigError(
                f"config.arms.{name}.epochs={arm.epochs} is not one step of "
                f"{experiment.data.batch_size} examples"
            )
        if arm.load:
            where = f"config.arms.{name}.load={arm.load!r}"
            _check_loaded(load(arm.load), models[arm.model], inputs.image, where)
    for key, steps in experiment.ptq.items():
        chain.check(steps, f"config.ptq.{key}")
    for key, recipe in experiment.qat.items():
        where = f"config.qat.{key}"
        if recipe.method not in qat.METHODS:
            raise ConfigError(unknown(f"{where}.method:", recipe.method, qat.METHODS))
        regime.of_recipe(recipe, 1, where)
    for key, recipe in experiment.distill.items():  # those of no arm too
        objective.of_recipe(vars(recipe), 1, f"config.distill.{key}")
    for key in experiment.rules:
        rules_of_entries(experiment.rules[key], OBSERVERS["mse"], f"config.rules.{key}")
    for key in {arm.model for arm in experiment.arms.values() if arm.bits}:
        _check_quantize(experiment, key, models[key], inputs.image)
    for name, arm in experiment.arms.items():
        if arm.bits in experiment.rules:
            _check_rules(experiment, name, models[arm.model], inputs.image)
    for name, arm in experiment.arms.items():
        if arm.distill:
            _check_taught(experiment, name, models, inputs, teachers)


def _warn_of_script(name: str, where: str) -> None:
    """Says of a class that no other program can import what will not work, and how to mend it."""
    module, _, class_name = name.partition(":")
    if module == "__main__" and class_name and processes.is_first():
        log.warning(
            "%s: %s is defined in a script or notebook: it trains here, but no other program, such "
            "as launch/export.py, finds it by name, and load_packed(path) elsewhere wants the "
            "model: load_packed(path, %s(...)). Put the class into a module of its own and import "
            "it from there to have both.",
            where,
            class_name,
            class_name,
        )


def _check_data(config: Data, inputs: Inputs) -> None:
    """Raises ConfigError for splits that share examples, or that nothing can be learned from."""
    names = {"train": config.train, "validation": config.validation, "test": config.test}
    for split, other in itertools.combinations(names, 2):
        shared = inputs.splits[split].shared_with(inputs.splits[other])
        if shared:
            raise ConfigError(
                f"config.data.{split}={names[split]!r} and config.data.{other}={names[other]!r} "
                f"have {shared} examples in common: expected splits that have none, or no number "
                "could be trusted"
            )
    train = inputs.splits["train"]
    if train.num_classes < 2:
        raise ConfigError(
            f"config.data.name={config.name!r} has {train.num_classes} class: expected two or "
            "more, since every loss of one class is 0"
        )
    for field in ("mean", "std"):
        values, channels = np.shape(getattr(config, field)), train.image_shape[-1:]
        if values not in ((), (1,), channels):
            raise ConfigError(
                f"config.data.{field}={getattr(config, field)}: expected a number, or one for each "
                f"of the {channels[0]} channels of {config.name}"
            )


def _check_compute(
    experiment: Experiment, models: dict[str, nn.Module], inputs: Inputs, layout: Layout
) -> None:
    compute, size = experiment.compute, experiment.data.batch_size
    if size % (layout.batch_parts * compute.accumulate):
        raise ConfigError(
            f"config.data.batch_size={size} is no multiple of the {layout.batch_parts} parts that "
            f"config.mesh cuts it into (data · fsdp) times config.compute.accumulate="
            f"{compute.accumulate}"
        )
    if compute.remat:
        paths = {
            path
            for model in models.values()
            for path in layers(model, _shapes(model, inputs.image), inputs.image)
        }
        if not any(re.fullmatch(compute.remat, path) for path in paths):
            raise ConfigError(
                f"config.compute.remat={compute.remat!r} matches none of {sorted(paths)}"
            )


def _check_loaded(
    packed: PackedModel, model: nn.Module, image: jax.ShapeDtypeStruct, where: str
) -> None:
    if packed.model != model:
        given, wanted = (" ".join(str(one).split()) for one in (packed.model, model))
        raise ConfigError(f"{where} is {given}, but the arm's model is {wanted}")
    try:
        packed.check(image)
    except PackedFileError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_size(model: nn.Module, image: jax.ShapeDtypeStruct, where: str) -> None:
    """Raises ConfigError for a model whose parameters alone are larger than the memory."""
    try:
        shapes = _shapes(model, image)
    except Exception:  # whatever a module of anybody's raises: `_check_outputs` says so
        return
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ConfigError(
            f"{where} has parameters of {size / 2**30:,.0f} GiB; this machine has "
            f"{memory / 2**30:,.0f} GiB of memory"
        )


def _check_outputs(model: nn.Module, image: jax.ShapeDtypeStruct, classes: int, where: str) -> None:
    """That a model takes the data, and has a logit for each class."""
    try:
        apply = functools.partial(quantize.apply, model)
        logits = jax.eval_shape(apply, _shapes(model, image), {}, image)
    except Exception as error:  # whatever a module of anybody's raises
        raise ConfigError(
            f"{where} can't take inputs {image.shape}: {type(error).__name__}: {error}"
        ) from error
    if getattr(logits, "shape", None) != (1, classes):
        given = getattr(logits, "shape", type(logits).__name__)
        raise ConfigError(f"{where} has outputs {given} for one input; expected {(1, classes)}")


def layers(model: nn.Module, variables: Variables, image: jax.ShapeDtypeStruct) -> Shapes:
    """The layers of a model that can be captured, in evaluation mode."""
    return capture.list_outputs(model, variables, image)


def _shapes(model: nn.Module, image: jax.ShapeDtypeStruct) -> Variables:
    return jax.eval_shape(quantize.as_network(model).init, jax.random.key(0), image)


def _check_quantize(
    experiment: Experiment, key: str, model: nn.Module, image: jax.ShapeDtypeStruct
) -> None:
    found = quantize.list_layers(model, _shapes(model, image), image)
    try:
        match(quantize.uniform_rules(8, 8, keep=experiment.quantize.keep), found)
    except ValueError as error:
        raise ConfigError(f"config.quantize.keep, model {key!r}: {error}") from error
    names = [f"{path}/{half}" for path in found for half in ("weights", "activations")]
    for pattern in experiment.quantize.fixed_scales:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ConfigError(
                f"config.quantize.fixed_scales, model {key!r}: {pattern!r} matches none of {names}"
            )


def _check_rules(
    experiment: Experiment, name: str, model: nn.Module, image: jax.ShapeDtypeStruct
) -> None:
    arm = experiment.arms[name]
    found = quantize.list_layers(model, _shapes(model, image), image)
    try:
        match(rules_of(experiment, arm), found)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.rules.{arm.bits}, arm {name!r}: {error}") from error


def _check_taught(
    experiment: Experiment,
    name: str,
    models: dict[str, nn.Module],
    inputs: Inputs,
    teachers: Teachers,
) -> None:
    arm, where = experiment.arms[name], f"config.arms.{name}"
    aim = objective.of_arm(experiment, name, steps=1)
    module = teachers.module(name)
    if aim.teacher_layers and module is None:
        raise ConfigError(
            f"{where}: config.distill.{arm.distill} looks at layers of the teacher, and "
            f"config.teachers.{arm.teacher} has none that it may look at"
        )
    taught_by = layers(module, _shapes(module, inputs.image), inputs.image) if module else {}
    model = models[arm.model]
    student = layers(model, _shapes(model, inputs.image), inputs.image)
    try:
        jax.eval_shape(
            lambda key: aim.init(key, student, taught_by, inputs.num_examples), jax.random.key(0)
        )
    except ConfigError as error:
        raise ConfigError(f"config.distill.{arm.distill}, arm {name!r}: {error}") from error
    offered = {"label", *teachers.offers(name)}
    for term in aim.terms:
        missing = set(term.method.reads) - offered
        if missing:
            raise ConfigError(
                f"{where}: config.distill.{arm.distill}.terms.{term.name} ({term.loss}) needs "
                f"{sorted(missing)}; config.cache.kind={experiment.cache.kind!r} and the teacher "
                f"offer {sorted(offered)}"
            )
    if inputs.augments(arm) and teachers.by_example(name):
        raise ConfigError(
            f"{where}.augment=True with config.data.augment and a teacher whose logits are kept by "
            "example: these do not fit augmented images; change one, or config.cache.kind"
        )
