"""Dataclasses and arguments from mappings, with errors that name the key and what it may hold."""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Mistake(Exception):
    """A user's mistake: the message is one line that says what was given and what is allowed."""


class ConfigError(Mistake, ValueError):
    """A config that can't be run; the message says which key, what it held, what it may hold."""


def unknown(what: str, given: Any, valid: Iterable[str]) -> str:
    """The message for a name that is none of the valid ones."""
    valid = list(valid)
    hint = did_you_mean(given, valid)
    return f"unknown {what} {given!r}{hint}; valid: {', '.join(valid) or 'none'}"


def did_you_mean(given: Any, valid: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the valid name closest to `given`, or an empty string."""
    close = difflib.get_close_matches(str(given), list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_arguments(function: Callable, given: Iterable[str], where: str) -> None:
    """Raises ConfigError if `function` can't be called with the arguments named `given`."""
    parameters = inspect.signature(function).parameters
    given = list(given)
    for name in given:
        if name not in parameters:
            raise ConfigError(unknown(f"key in {where}:", name, parameters))
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise ConfigError(f"{where}.{name} is missing")


def build(cls: type, fields: Any, where: str) -> Any:
    """A dataclass from a mapping; nested dataclasses by their annotations."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where}={fields!r}: want a mapping")
    hints = typing.get_type_hints(cls)
    for key in fields:
        if key not in hints:
            raise ConfigError(unknown(f"key in {where}:", key, hints))
    for field in dataclasses.fields(cls):
        required = dataclasses.MISSING is field.default is field.default_factory
        if required and field.name not in fields:
            raise ConfigError(f"{where}.{field.name} is missing")
    return cls(**{k: _coerce(hints[k], v, f"{where}.{k}") for k, v in fields.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it: tuples for lists, whole numbers as floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is types.UnionType:
        errors = []
        for option in args:
            try:
                return _coerce(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError("; or ".join(errors))
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{where}={value!r}: want a list or tuple")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: want a mapping")
        return {str(k): _coerce(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return tuple(_coerce(Any, v, where) for v in value) if isinstance(value, list) else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value!r}: want a finite number")
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r}: want {hint.__name__}")
    return value
