"""Checks of a config that need the data or the models; they run before anything trains."""

import functools
import itertools
import logging
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np

from kdq import deploy, processes, quantize
from kdq.config import ConfigError, Data, Search, unknown
from kdq.deploy import PackedFileError, extras
from kdq.deploy.measure import latency
from kdq.distill import capture
from kdq.experiment import costing
from kdq.experiment.context import Context, shapes
from kdq.experiment.inputs import Inputs
from kdq.experiment.quantized import OBSERVERS, rules_of, rules_of_entries
from kdq.experiment.store import load
from kdq.fields import build
from kdq.quantize import qat
from kdq.quantize.ptq import chain
from kdq.quantize.rules import match
from kdq.search import sensitivity
from kdq.search.evaluate import OBJECTIVES
from kdq.search.searchers import METHODS
from kdq.train import objective
from kdq.train.training import build_regime

log = logging.getLogger(__name__)

MOST_STEPS = 2**31 - 1  # which counters on the device hold


def check(context: Context, arms: Sequence[str]) -> None:
    """Raises ConfigError for a config that the data, the layers or the teachers do not fit.

    Searches are checked as far as these arms need them.
    """
    experiment, inputs = context.experiment, context.inputs
    _check_task(context)
    spec = inputs.splits["train"].spec[inputs.key]
    if inputs.augment and (spec.dtype != np.uint8 or len(spec.shape) != 3):
        raise ConfigError(
            "config.data.augment changes images, uint8 [height, width, channels]; "
            f"{experiment.data.name} has {spec.dtype} {spec.shape}"
        )
    _check_data(experiment.data, inputs)
    for key, fields in experiment.models.items():
        _check_model(context, key, fields["name"])
    _check_compute(context)
    for name in experiment.arms:
        _check_arm(context, name)
    for key, steps in experiment.ptq.items():
        chain.check(steps, f"config.ptq.{key}", categorical=context.task.categorical)
    for key, recipe in experiment.qat.items():
        where = f"config.qat.{key}"
        if recipe.method not in qat.METHODS:
            raise ConfigError(unknown(f"{where}.method:", recipe.method, qat.METHODS))
        build_regime(recipe, 1, where)
    for key, recipe in experiment.distill.items():  # those of no arm too
        objective.build(vars(recipe), 1, f"config.distill.{key}", context.task)
    for key in experiment.rules:
        rules_of_entries(experiment.rules[key], OBSERVERS["mse"], f"config.rules.{key}")
    _check_patterns(context)
    for name, arm in experiment.arms.items():
        if arm.distill:
            _check_taught(context, name)
    method = experiment.search.method  # of launch/search.py, whatever runs now
    if method not in METHODS:
        raise ConfigError(unknown("config.search.method:", method, METHODS))
    for name in dict.fromkeys(experiment.arms[arm].bits for arm in arms):
        if name in experiment.searches:
            _check_search(context, experiment.searches[name], f"config.searches.{name}")


def _check_arm(context: Context, name: str) -> None:
    experiment, inputs = context.experiment, context.inputs
    arm, where = experiment.arms[name], f"config.arms.{name}"
    classes = inputs.classes
    if arm.without_classes and not context.task.categorical:
        raise ConfigError(
            f"{where}.without_classes={arm.without_classes}: task {context.task.name!r} has no "
            "classes to leave out; expected ()"
        )
    if arm.label_smoothing and "label_smoothing" not in context.task.loss_options:
        raise ConfigError(
            f"{where}.label_smoothing={arm.label_smoothing}: the loss of task "
            f"{context.task.name!r} has none; expected 0"
        )
    if not set(arm.without_classes) <= set(range(classes)):
        raise ConfigError(
            f"{where}.without_classes={arm.without_classes}: "
            f"{experiment.data.name} has the classes 0 to {classes - 1}"
        )
    if not len(inputs.ids(arm)):
        raise ConfigError(f"{where}.without_classes leaves no example to train on")
    if inputs.steps(arm) > MOST_STEPS:
        raise ConfigError(
            f"{where}.epochs={arm.epochs} are {inputs.steps(arm):.3g} steps of "
            f"{experiment.data.batch_size} examples; expected at most {MOST_STEPS}"
        )
    if arm.epochs and not inputs.last_step(arm):
        raise ConfigError(
            f"{where}.epochs={arm.epochs} is not one step of {experiment.data.batch_size} examples"
        )
    if arm.load:
        packed, where = load(arm.load), f"{where}.load={arm.load!r}"
        modules = (packed.network.module, context.model(arm))
        if modules[0] != modules[1]:
            loaded, expected = (" ".join(str(module).split()) for module in modules)
            raise ConfigError(f"{where} is {loaded}, but the arm's model is {expected}")
        try:
            packed.check(inputs.image)
        except PackedFileError as error:
            raise ConfigError(f"{where}: {error}") from error


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
    for field in ("mean", "std"):
        values, channels = np.shape(getattr(config, field)), train.spec[inputs.key].shape[-1:]
        if values not in ((), (1,), channels):
            raise ConfigError(
                f"config.data.{field}={getattr(config, field)}: expected a number, or one for each "
                f"of the {channels[0]} channels of {config.name}"
            )


def _check_task(context: Context) -> None:
    """Raises ConfigError for labels of another task, and for what only classifiers have."""
    experiment, task, inputs = context.experiment, context.task, context.inputs
    for key in (*task.keys, task.target):
        if key not in (spec := inputs.splits["train"].spec):
            raise ConfigError(
                unknown(f"array of {experiment.data.name} in config.task:", key, spec)
            )
    if task.categorical and inputs.classes == 1:
        raise ConfigError(
            f"config.data.name={experiment.data.name!r} has 1 class: expected two or more, since "
            "every loss of one class is 0"
        )
    facts = inputs.facts
    for name, source in inputs.splits.items():
        # Labels of classes are not read: a source has checked its own, and they may be many.
        labels = source.read(np.arange(1))[task.target]
        if np.issubdtype(labels.dtype, np.floating):
            labels = inputs.read_labels(name, task.target)
        try:
            task.check({task.target: labels}, facts)
        except ConfigError as error:
            split = getattr(experiment.data, name)
            raise ConfigError(f"{experiment.data.name} {split}: {error}") from error
    if task.categorical:
        return
    if experiment.cache.kind in ("top_k", "sampled"):
        raise ConfigError(
            f"config.cache.kind={experiment.cache.kind!r}: task {task.name!r} has no classes to "
            "choose from; expected none, memory or dense"
        )
    for key, teacher in experiment.teachers.items():
        for field, value, expected in (
            ("average", "probability", "logit"),
            ("within_class", True, False),
        ):
            if getattr(teacher, field, None) == value:
                raise ConfigError(
                    f"config.teachers.{key}.{field}={value!r}: task {task.name!r} has no classes; "
                    f"expected {expected!r}"
                )


def _check_compute(context: Context) -> None:
    experiment, layout = context.experiment, context.layout
    compute, size = experiment.compute, experiment.data.batch_size
    if size % (layout.batch_parts * compute.accumulate):
        raise ConfigError(
            f"config.data.batch_size={size} is no multiple of the {layout.batch_parts} parts that "
            f"config.mesh cuts it into (data · fsdp) times config.compute.accumulate="
            f"{compute.accumulate}"
        )
    if compute.remat:
        paths = {path for key in context.models for path in context.outputs(key)}
        if not any(re.fullmatch(compute.remat, path) for path in paths):
            raise ConfigError(
                f"config.compute.remat={compute.remat!r} matches none of {sorted(paths)}"
            )


def _check_model(context: Context, key: str, name: str) -> None:
    """Raises ConfigError for a model that can't take the data, has other outputs, or is too large.

    What will not work with a class that no other program can import is told in a warning.
    """
    image, task, where = context.inputs.image, context.task, f"config.models.{key}"
    try:
        shapes = context.shapes(key)
        leaves = jax.tree.leaves(shapes)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:
            raise ConfigError(
                f"{where} has parameters of {size / 2**30:,.0f} GiB; this machine has "
                f"{memory / 2**30:,.0f} GiB of memory"
            )
        apply = functools.partial(quantize.apply, context.models[key])
        outputs = jax.eval_shape(apply, shapes, {}, image)
    except ConfigError:
        raise
    except Exception as error:  # whatever a module of anybody's raises
        raise ConfigError(
            f"{where} can't take inputs {image.shape}: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(outputs, "shape"):
        kind = type(outputs).__name__
        raise ConfigError(f"{where} has outputs {kind} for one input; expected an array")
    labels = context.inputs.splits["train"].read(np.arange(1))[task.target]
    try:
        task.check({task.target: labels}, context.inputs.facts, outputs)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    warn_of_script(name, where)


def warn_of_script(name: str, where: str) -> None:
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


def _check_patterns(context: Context) -> None:
    """Raises ConfigError for patterns of layers that match none of those that are quantized."""
    experiment = context.experiment
    config, arms = experiment.quantize, experiment.arms
    rules = {
        f"config.quantize.keep, model {arm.model!r}": (
            arm.model,
            quantize.uniform_rules(8, 8, keep=config.keep),
        )
        for arm in arms.values()
        if arm.bits
    }
    rules |= {
        f"config.rules.{arm.bits}, arm {name!r}": (arm.model, rules_of(experiment, arm))
        for name, arm in arms.items()
        if arm.bits in experiment.rules
    }
    for where, (key, rules_of_model) in rules.items():
        try:
            match(rules_of_model, context.layers(key))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    for key in {arm.model for arm in arms.values() if arm.bits}:
        halves = ("weights", "activations")
        names = [f"{path}/{half}" for path in context.layers(key) for half in halves]
        for pattern in config.fixed_scales:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise ConfigError(
                    f"config.quantize.fixed_scales, model {key!r}: {pattern!r} matches none of "
                    f"{names}"
                )


def _check_taught(context: Context, name: str) -> None:
    experiment, inputs, teachers = context.experiment, context.inputs, context.teachers
    arm, where = experiment.arms[name], f"config.arms.{name}"
    aim = objective.arm_objective(experiment, name, steps=1, task=context.task)
    module = teachers.module(name)
    if aim.teacher_layers and module is None:
        raise ConfigError(
            f"{where}: config.distill.{arm.distill} looks at layers of the teacher, and "
            f"config.teachers.{arm.teacher} has none that it may look at"
        )
    taught_by = {}
    if module:
        taught_by = capture.list_outputs(module, shapes(module, inputs.image), inputs.image)
    student = context.outputs(arm.model)
    try:
        jax.eval_shape(
            lambda key: aim.init(key, student, taught_by, inputs.num_examples), jax.random.key(0)
        )
    except ConfigError as error:
        raise ConfigError(f"config.distill.{arm.distill}, arm {name!r}: {error}") from error
    offered = {context.task.target, *teachers.offers(name)}
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


def _check_search(context: Context, search: Search, where: str) -> None:
    if search.method not in METHODS:
        raise ConfigError(unknown(f"{where}.method:", search.method, METHODS))
    method = METHODS[search.method]
    try:
        extras.load("search", *method.libraries)
    except ImportError as error:
        raise ConfigError(f"{where}.method={search.method!r}: {error}") from error
    build(method.Settings, search.options, f"{where}.options")
    for field, valid in (
        ("objective", OBJECTIVES),
        ("sensitivity", sensitivity.MEASURES),
        ("observer", OBSERVERS),
        ("runtime", deploy.FORMATS),
    ):
        if (value := getattr(search, field)) not in valid:
            raise ConfigError(unknown(f"{where}.{field}:", value, valid))
    if "pairs" in method.needs and search.sensitivity not in OBJECTIVES:
        of_pairs = f"{where}.sensitivity of pairs:"
        raise ConfigError(unknown(of_pairs, search.sensitivity, OBJECTIVES))
    for student in search.students:
        costing.choices_of(search, context.layers(context.experiment.arms[student].model), where)
    if "latency" in (*search.most.set, *search.share.set):
        try:
            deploy.check_formats((search.runtime,))
            latency.cores(search.threads)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{where}: a budget of latency: {error}") from error
