"""A term of the objective: a loss, its weight, and the layers that it looks at."""

import inspect
import typing
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdq.distill import adapters, schedule
from kdq.distill.capture import Outputs
from kdq.distill.methods import LossInputs, Method, list_methods
from kdq.distill.schedule import Schedule
from kdq.fields import LARGEST, ConfigError, Limits, limits_of_parameter, unknown
from kdq.schema import HEAVIEST
from kdq.tasks.base import Task
from kdq.tasks.classification import Classification
from kdq.types import Array, Batch

_WEIGHT = Limits(at_least=0, at_most=HEAVIEST)
Shapes = Mapping[str, jax.ShapeDtypeStruct]  # by layer path
CLASSIFICATION = Classification()


class Term(flax.struct.PyTreeNode):
    """A weighted loss. Its numbers are data: arms that differ only in them share a compiled step.

    Invariant: `student` and `teacher` name as many layers as the method captures.
    """

    weight: Schedule
    options: dict[str, Array]  # numbers: a temperature
    name: str = flax.struct.field(pytree_node=False)  # its key in the config and in the metrics
    loss: str = flax.struct.field(pytree_node=False)  # a key of `list_methods(task)`
    student: tuple[str, ...] = flax.struct.field(pytree_node=False)  # layer paths
    teacher: tuple[str, ...] = flax.struct.field(pytree_node=False)
    adapter: str = flax.struct.field(pytree_node=False)
    pool: bool = flax.struct.field(pytree_node=False)  # compare means over positions, not maps
    # Options that shape the computation, such as a chunk size.
    fixed: tuple[tuple[str, Any], ...] = flax.struct.field(pytree_node=False)
    task: Task = flax.struct.field(default=CLASSIFICATION, pytree_node=False)

    @property
    def method(self) -> Method:
        return list_methods(self.task)[self.loss]

    def init(
        self, key: Array, student: Shapes, teacher: Shapes, num_examples: int
    ) -> tuple[Any, Any]:
        """Returns `(params, memory)`: what trains with the student, what the method remembers.

        `student` and `teacher` are of `capture.list_outputs`, `num_examples` of the training split,
        whose ids are below it. Raises ConfigError, with what is valid, for a layer that is not
        there or shapes that do not fit.
        """
        where = f"term {self.name!r} ({self.loss})"
        shapes = []
        for role, paths, valid in (
            ("student", self.student, student),
            ("teacher", self.teacher, teacher),
        ):
            for path in paths:
                if path not in valid:
                    raise ConfigError(unknown(f"{where}: layer of the {role}:", path, valid))
            whole = [valid[path].shape for path in paths]
            shapes.append(tuple((s[0], s[-1]) if self.pool else s for s in whole))
        try:
            return self.method.init(
                key,
                *shapes,
                num_examples=num_examples,
                adapter=self.adapter,
                options=dict(self.fixed),
            )
        except ValueError as error:
            raise ConfigError(
                f"{where}, student layer {self.student}, teacher layer {self.teacher}: {error}"
            ) from error

    def count(self, batch: Batch, weights: Array) -> Array:
        """Returns the number of values that count: predictions on logits, examples on features."""
        if not self.method.layers:
            return jnp.sum(weights)
        return jnp.sum(batch["mask"]) if "mask" in batch else jnp.float32(len(weights))

    def look(self, student: Outputs, teacher: Outputs, batch: Batch, weights: Array) -> LossInputs:
        """Returns what the method compares of a batch, with no gradient to the teacher."""

        def see(outputs: Outputs, paths: tuple[str, ...]) -> tuple[Array, ...]:
            if not paths:
                return (outputs.logits,)
            features = [outputs.features[path] for path in paths]
            mean = lambda x: x.mean(tuple(range(1, x.ndim - 1))) if self.pool else x
            return tuple(map(mean, features))

        return LossInputs(
            student=see(student, self.student),
            teacher=jax.lax.stop_gradient(see(teacher, self.teacher)),
            batch=batch,
            weights=weights,
            mask=batch.get("mask"),
        )

    def __call__(
        self, params: Any, memory: Any, inputs: LossInputs, key: Array | None
    ) -> tuple[Array, Any]:
        """Returns `(values, memory)`: one for each that `count` counts, masked, not weighted."""
        options = {**self.options, **dict(self.fixed)}
        values, memory = self.method(params, memory, inputs, key, options)
        shape = inputs.weights.shape[: 1 if self.method.layers else None]
        if values.shape != shape:
            raise ValueError(
                f"term {self.name!r} ({self.loss}): expected values {shape}, got {values.shape}"
            )
        return values, memory


def build(name: str, config: Mapping[str, Any], where: str, task: Task = CLASSIFICATION) -> Term:
    """Builds a term from its entry in a config.

    The entry has "loss", a key of `list_methods(task)`; "weight", a number or a schedule
    (`schedule.build`); for the losses on features "student" and "teacher", layer paths, "adapter",
    and "pool" (false: maps and tokens are compared as they are); and what else the loss takes.
    Raises ConfigError for an unknown loss or option, a missing one, a value of the wrong type.
    """
    fields = dict(config)
    loss = fields.pop("loss", None)
    methods = list_methods(task)
    if loss not in methods:
        of_task = "" if task == CLASSIFICATION else f" of task {task.name!r}"
        raise ConfigError(unknown(f"{where}.loss{of_task}:", loss, methods))
    method = methods[loss]
    weight = schedule.build(fields.pop("weight", 1.0), f"{where}.weight", _WEIGHT)
    layers = {}
    for role in ("student", "teacher"):
        value = fields.pop(role, ())
        layers[role] = paths = (value,) if isinstance(value, str) else tuple(value)
        if len(paths) != method.layers or not all(isinstance(path, str) for path in paths):
            raise ConfigError(
                f"{where}.{role}={value!r}: {loss} looks at {method.layers} layers; "
                "want that many paths"
            )
    adapter = fields.pop("adapter", method.adapter)
    if adapter != method.adapter and (not method.adapter or adapter not in adapters.KINDS):
        valid = adapters.KINDS if method.adapter else ()
        raise ConfigError(unknown(f"{where}.adapter ({loss}):", adapter, valid))
    pool = fields.pop("pool", False)
    if not isinstance(pool, bool) or (pool and not method.layers):
        raise ConfigError(f"{where}.pool={pool!r}: want true or false, and layers ({loss}) to pool")
    options, fixed = _options(method.options(), fields, f"{where} ({loss})")
    return Term(
        weight=weight,
        options=options,
        name=name,
        loss=loss,
        **layers,
        adapter=adapter,
        pool=pool,
        fixed=fixed,
        task=task,
    )


def _options(
    valid: Mapping[str, inspect.Parameter], fields: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """Returns `(numbers, the rest)`: what is annotated as a float is data, the rest is static."""
    numbers, fixed = {}, {}
    for name in fields:
        if name not in valid:
            raise ConfigError(unknown(f"option of {where}:", name, valid))
    for name, parameter in valid.items():
        value = fields.get(name, parameter.default)
        hint, limits = limits_of_parameter(parameter.annotation)
        kinds = typing.get_args(hint) or (hint,)
        if value is inspect.Parameter.empty:
            raise ConfigError(f"{where} needs {name!r}; got {sorted(fields)}")
        if parameter.annotation is inspect.Parameter.empty:
            raise ConfigError(
                f"{where}: the loss does not annotate {name!r}; want {name}: float in its "
                "definition where the option is data, else its type"
            )
        if float in kinds:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{where}.{name}={value!r}: want a number")
            if not abs(value) <= LARGEST:  # a NaN is not
                raise ConfigError(f"{where}.{name}={value!r}: want a finite number")
            limits.check(value, f"{where}.{name}")
            numbers[name] = np.float32(value)
        elif isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
            if value is not None:
                limits.check(value, f"{where}.{name}")
            fixed[name] = value
        else:
            names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            raise ConfigError(f"{where}.{name}={value!r}: expected {names}")
    return numbers, tuple(sorted(fixed.items()))
