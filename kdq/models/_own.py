"""Linen modules that are not in this package, by the name `package.module:Class`."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import re
import sys
from typing import Any

import numpy as np
from flax import linen as nn

from kdq.fields import ConfigError, unknown

LINEN = {"parent", "name"}  # the fields that every module has


def is_own(name: Any) -> bool:
    """Returns if a model's name is that of a class elsewhere."""
    return isinstance(name, str) and ":" in name


def is_imported(name: str) -> bool:
    """Returns if the class is in memory, so that finding it runs no code."""
    module, _, path = name.partition(":")
    place: Any = sys.modules.get(module)
    for part in path.split("."):
        place = inspect.getattr_static(place, part, None)  # lazy modules import what is asked for
    return place is not None


def find(name: str) -> type[nn.Module]:
    """Returns the class, importing its module. Raises ConfigError if there is none."""
    module, _, path = name.partition(":")
    try:
        place: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model {name!r}: {error}; expected package.module:Class of something that can be "
            "imported (PYTHONPATH, or pip install -e)"
        ) from error
    for part in path.split("."):
        if not hasattr(place, part):
            if module == "__main__":
                raise ConfigError(
                    f"model {name!r} is of another program, a script or notebook; a class that "
                    "several use must be in a module that they can import"
                )
            classes = [key for key, value in vars(place).items() if _is_model(value)]
            raise ConfigError(unknown(f"class of {module} in model {name!r}:", part, classes))
        place = getattr(place, part)
    if not _is_model(place):
        raise ConfigError(f"model {name!r} is no class of flax.linen.Module: {place!r}")
    if "train" not in (takes := inspect.signature(place.__call__).parameters):
        raise ConfigError(
            f"model {name!r}: __call__ takes {list(takes)[1:]}; expected `train: bool` by keyword,"
            " e.g. def __call__(self, inputs, *, train: bool = False)"
        )
    return place


def describe(model: nn.Module) -> dict[str, Any]:
    """Returns the name and fields from which `build` makes the model again.

    Raises:
      ConfigError: a class that has no place in a module, or a field that no config can hold and
        that is not at its default.
    """
    cls = type(model)
    name = f"{cls.__module__}:{cls.__qualname__}"
    if "<locals>" in name:
        raise ConfigError(f"model {name!r} is defined in a function: move it to the module itself")
    if find(name) is not cls:
        raise ConfigError(f"the model is of a class {name!r} that was defined anew: make it again")
    fields = {"name": name}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name in LINEN:
            continue
        try:
            fields[field.name] = _plain(value)
        except TypeError:
            if value is not field.default:
                raise ConfigError(
                    f"{name}.{field.name}={value!r}: a config holds numbers, strings, dtypes and "
                    "tuples of them; make it the field's default, in a derived class if need be"
                ) from None
    return fields


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, np.dtype | type):
        return np.dtype(value).name
    raise TypeError


def source_digest(name: str) -> str:
    """Returns a digest of the source of a class, and of all in its module that it calls."""
    model = find(name)
    seen: dict[str, str] = {}
    todo: list[Any] = [model]
    while todo:
        part = todo.pop()
        key = part.__qualname__
        if key in seen or part.__module__ != model.__module__:
            continue
        functions = _functions(part)
        seen[key] = "".join([*map(_source, functions), *_defaults(part)])
        for function in functions:
            names = function.__code__.co_names
            used = (function.__globals__.get(n) for n in names)
            todo += [x for x in used if inspect.isfunction(x) or _is_model(x)]
        if inspect.isclass(part):
            todo += [base for base in part.__mro__[1:] if _is_model(base)]
    return hashlib.sha256(repr(sorted(seen.items())).encode()).hexdigest()


def _functions(part: Any) -> list[Any]:
    """Returns the functions of a class body, not wrapped by Linen; or the function itself."""
    inner = map(inspect.unwrap, vars(part).values()) if inspect.isclass(part) else [part]
    functions = [f for f in inner if inspect.isfunction(f) and f.__module__ == part.__module__]
    return [f for f in functions if f.__code__.co_filename != "<string>"]  # not dataclasses' own


def _defaults(part: Any) -> list[str]:
    """Returns defaults of fields in a class's body; functions by name, since addresses change."""
    body = vars(part) if inspect.isclass(part) else {}
    names = body.get("__annotations__", {}).keys() - LINEN
    defaults = {n: getattr(body[n], "__qualname__", body[n]) for n in sorted(names) if n in body}
    return [re.sub(r" at 0x\w+", "", f"{name}={default!r}") for name, default in defaults.items()]


@functools.cache
def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed in at a prompt
        code = function.__code__
        return repr(
            (code.co_code, code.co_names, [c for c in code.co_consts if not inspect.iscode(c)])
        )


def _is_model(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)
