"""Flax Linen models, one family a file; none of them knows of quantization or distillation.

Every model is called the same way:

    logits = model.apply(variables, images, train=False)          # [batch, classes] float32
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

with `images: [batch, height, width, channels] float32`.  To add a family, add a file with a Linen
module and end it with `Model = <the module's class>`.  A module that is elsewhere is named
`package.module:Class`.
"""

import dataclasses
import importlib
import pkgutil
import typing
from typing import Any

import jax
from flax import linen as nn

from kdq.fields import unknown
from kdq.models._own import describe, find, is_imported, is_own, source_digest
from kdq.models._product import Product
from kdq.types import Variables

__all__ = [
    "Product",
    "build",
    "count_parameters",
    "describe",
    "is_imported",
    "is_own",
    "names",
    "source_digest",
]


def names() -> list[str]:
    """Returns the names that `build` accepts: the modules of this package, one a family."""
    modules = pkgutil.iter_modules(__path__)
    return sorted(m.name for m in modules if not m.ispkg and not m.name.startswith("_"))


def build(name: str, **kwargs: Any) -> nn.Module:
    """Builds the model that `kdq.models.<name>` defines, or a class elsewhere.

    Args:
      name: a module of this package, e.g. "cnn", or "package.module:Class", which is imported.
      **kwargs: the fields of that model.  Lists become tuples, because a model is a static argument
        of jitted functions and so must be hashable.

    Raises:
      ValueError: an unknown name or field, a field left out, or a value the model refuses.
    """
    if is_own(name):
        model = find(name)
    elif name in names():
        model = importlib.import_module(f"{__name__}.{name}").Model
    else:
        valid = (*names(), "package.module:Class")
        raise ValueError(unknown("model", name, valid))
    fields = [f for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    for key in kwargs:
        if key not in [f.name for f in fields]:
            raise ValueError(unknown(f"field of model {name!r}:", key, [f.name for f in fields]))
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in kwargs:
            raise ValueError(f"model {name!r} needs {field.name!r}; given: {sorted(kwargs)}")
    hints = _simple_hints(model)
    for key in hints.keys() & kwargs.keys():
        hint, value = hints[key], kwargs[key]
        if isinstance(value, bool) != (hint is bool) or not isinstance(value, _SIMPLE[hint]):
            raise ValueError(f"{key}={value!r}: expected {hint.__name__}")
    return model(**{key: _freeze(value) for key, value in kwargs.items()})


# Annotations of fields that a value must fit; true and false are no numbers.
_SIMPLE = {bool: bool, int: int, float: (int, float), str: str}


def _simple_hints(model: type) -> dict[str, type]:
    """Returns the annotations of fields that are one of `_SIMPLE`."""
    try:
        hints = typing.get_type_hints(model)
    except Exception:  # of a user's class, whose annotations may be anything
        return {}
    return {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and hint in _SIMPLE
    }


def count_parameters(variables: Variables) -> int:
    """Returns the number of trained scalars: the "params" collection, without batch statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value
