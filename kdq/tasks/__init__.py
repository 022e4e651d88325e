"""Tasks, one a file: how a batch becomes inputs, and what each prediction is worth.

To add a task, add a file with a frozen dataclass that implements `kdq.tasks.base.Task`, and end it
with `Task = <the class>`.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from kdq import fields
from kdq.fields import ConfigError, unknown
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks.base import Task

__all__ = ["Metric", "Task", "build", "names"]

_NO_TASKS = ("base", "metric")


def names() -> list[str]:
    """Returns the names that `build` accepts: the modules of this package that hold a task."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NO_TASKS)


def build(name: str, **options: Any) -> "Task":
    """Builds the task that `kdq.tasks.<name>` defines.

    Args:
      name: a module of this package, "classification".
      **options: its fields, as a config has them: numbers, text, lists.

    Raises:
      ConfigError: an unknown name or field, or a value beyond the limits of a field.
    """
    if name not in names():
        raise ConfigError(unknown("config.task.name:", name, names()))
    return fields.build(importlib.import_module(f"{__name__}.{name}").Task, options, "config.task")


def __getattr__(name: str) -> object:
    """`kdq.tasks.Task`: metrics, which reports read, are there without its JAX."""
    if name == "Task":
        return importlib.import_module(f"{__name__}.base").Task
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
