"""Dataclasses and arguments from mappings, with errors that name the key and what it may hold.

A constraint stands at the field: `temperature: float = field(4.0, above=0)`. `build` enforces it.
"""

import dataclasses
import difflib
import functools
import inspect
import os
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LARGEST = 3.4e38  # of what float32 holds, in which all that a config says is computed
LARGEST_INT = 2**63 - 1
# Of Unicode: control characters, lone surrogates, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
_TURNS_TEXT = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,99}")
_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)  # no folders of Windows


class Mistake(Exception):
    """A user's mistake: the message is one line that says what was given and what is allowed."""


class ConfigError(Mistake, ValueError):
    """A config that can't be run; the message says which key, what it held, what it may hold."""


def unknown(what: str, value: Any, valid: Iterable[str]) -> str:
    """The message for a name that is none of the valid ones."""
    valid = list(valid)
    hint = did_you_mean(value, valid)
    return f"unknown {what} {value!r}{hint}; valid: {', '.join(valid) or 'none'}"


def did_you_mean(name: Any, valid: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the valid name closest to `given`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_arguments(function: Callable, names: Iterable[str], where: str) -> None:
    """Raises ConfigError if `function` can't be called with the arguments of these names."""
    parameters = inspect.signature(function).parameters
    names = list(names)
    for name in names:
        if name not in parameters:
            raise ConfigError(unknown(f"key in {where}:", name, parameters))
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in names:
            raise ConfigError(f"{where}.{name} is missing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a value beside its type; of a sequence each of its values.

    Of a mapping only `some` and `folders` count.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    one_of: tuple[str, ...] = ()
    pattern: bool = False  # a regular expression
    some: bool = False  # a text, sequence or mapping that is not empty
    distinct: bool = False  # a sequence without repetitions
    folders: tuple[str, ...] | None = None  # keys that name folders, but none of these
    path: bool = False  # of a file or folder, in which ~ is the user's own folder
    # Sections of the whole config; a value is a key of one of them, or "" if that is the default.
    refers: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # other fields that are not empty or 0 if this one is not

    def check(self, value: Any, where: str) -> None:
        """Raises ConfigError for a value beyond the limits."""
        if self.some and isinstance(value, str | tuple | Mapping) and not value:
            raise ConfigError(f"{where} is empty: expected one or more")
        if isinstance(value, Mapping):
            for name in value if self.folders is not None else ():
                self._check_folder(name, f"{where}.{name}")
            return
        if self.distinct and len(set(value)) < len(value):
            raise ConfigError(f"{where}={value}: expected them all different")
        if isinstance(value, tuple):
            for i, each in enumerate(value):
                self._check_each(each, f"{where}[{i}]")
        else:
            self._check_each(value, where)

    def _check_each(self, value: Any, where: str) -> None:
        if self.one_of and value not in self.one_of:
            raise ConfigError(unknown(f"{where}:", value, self.one_of))
        if self.pattern:
            try:
                re.compile(value)
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(f"{where}={value!r} is no regular expression: {error}") from error
        for limit, breaks in (
            (self.above, lambda limit: not value > limit),
            (self.at_least, lambda limit: not value >= limit),
            (self.below, lambda limit: not value < limit),
            (self.at_most, lambda limit: not value <= limit),
        ):
            if limit is not None and breaks(limit):
                raise ConfigError(f"{where}={value!r}: expected {self}")

    def _check_folder(self, name: str, where: str) -> None:
        if not _FOLDER.fullmatch(name):
            raise ConfigError(
                f"{where}: that name is a folder; expected up to 100 letters, digits, _ and -"
            )
        taken = [other for other in self.folders or () if other == name.lower()]
        if taken or _DEVICES.fullmatch(name):
            whose = "kdq's own" if taken else "a device's on Windows"
            raise ConfigError(f"{where}: the folder {name!r} would be {whose}; choose another name")

    def __str__(self) -> str:
        """ "0 to below 1", "more than 0", "at least 1"."""
        first, last = (
            next((v for v in pair if v is not None), None)
            for pair in ((self.above, self.at_least), (self.below, self.at_most))
        )
        low = f"{'more than ' if self.above is not None else ''}{first}"
        high = f"{'below ' if self.below is not None else ''}{last}"
        if first is None:
            return high if self.below is not None else f"at most {last}"
        if last is None:
            return low if self.above is not None else f"at least {first}"
        return f"{low} to {high}"


NO_LIMITS = Limits()


def field(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    **limits: Any,
) -> Any:
    """A dataclass field whose values have limits, see `Limits`."""
    # A dataclass is told of no default by none, not by MISSING in its place.
    chosen = {"default": default, "default_factory": default_factory}
    chosen = {k: v for k, v in chosen.items() if v is not dataclasses.MISSING}
    return dataclasses.field(**chosen, metadata={"limits": Limits(**limits)})


def limits_of(cls: type, name: str) -> Limits:
    """The limits of a dataclass's field."""
    (of_field,) = (f for f in dataclasses.fields(cls) if f.name == name)
    return of_field.metadata.get("limits", NO_LIMITS)


def limits_of_parameter(annotation: Any) -> tuple[Any, Limits]:
    """`(the type, the limits)` of an annotation, which may be `Annotated[type, Limits(...)]`."""
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation, NO_LIMITS
    limits = [value for value in annotation.__metadata__ if isinstance(value, Limits)]
    return annotation.__origin__, limits[0] if limits else NO_LIMITS


def build(cls: type, fields: Any, where: str) -> Any:
    """A dataclass from a mapping; nested dataclasses by their annotations."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where}={shortened(fields)}: expected a mapping")
    for key in fields:
        if key not in hints(cls):
            raise ConfigError(unknown(f"key in {where}:", key, hints(cls)))
    for field in dataclasses.fields(cls):
        required = dataclasses.MISSING is field.default is field.default_factory
        if required and field.name not in fields:
            raise ConfigError(f"{where}.{field.name} is missing")
    return cls(**{name: convert(cls, name, v, f"{where}.{name}") for name, v in fields.items()})


def check_references(config: Any, part: Any, where: str) -> None:
    """Raises ConfigError if a field names an entry of another section that is not there.

    Args:
      config: the whole, a dataclass with the sections that `Limits.refers` names.
      part: it, or a dataclass in it.
      where: the place of the part.
    """
    for field in dataclasses.fields(part):
        value, place = getattr(part, field.name), f"{where}.{field.name}"
        if sections := limits_of(type(part), field.name).refers:
            valid = [name for section in sections for name in getattr(config, section)]
            optional = value == field.default == ""
            for name in () if optional else value if isinstance(value, tuple) else (value,):
                if name not in valid:
                    noun = " or ".join(s.removesuffix("s") for s in sections)
                    shown = f"{place}: {noun}" if "arms" in sections else f"{place}:"
                    raise ConfigError(unknown(shown, name, valid))
        elif dataclasses.is_dataclass(value):
            check_references(config, value, place)
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                if dataclasses.is_dataclass(entry):
                    check_references(config, entry, f"{place}.{key}")


def check_needs(part: Any, where: str) -> None:
    """Raises ConfigError if a field of a dataclass is set without others that it needs."""
    for name, value in vars(part).items():
        needs = limits_of(type(part), name).needs
        if value and not all(getattr(part, other) for other in needs):
            raise ConfigError(f"{where}.{name}={value!r}: needs {' and '.join(needs)}")


def convert(cls: type, name: str, value: Any, where: str) -> Any:
    """Returns the value of a field of a dataclass, of its type and within its limits.

    Raises ConfigError for any other.
    """
    limits, value = limits_of(cls, name), _coerce(hints(cls)[name], value, where)
    limits.check(value, where)
    if not limits.path:
        return value
    if isinstance(value, tuple):
        return tuple(expand_user(path, where) for path in value)
    return expand_user(value, where)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Returns the types of a dataclass's fields, by name."""
    types_of = typing.get_type_hints(cls)
    return {field.name: types_of[field.name] for field in dataclasses.fields(cls)}


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it: tuples for lists, whole numbers as floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is types.UnionType:
        if value is None and types.NoneType in args:
            return None
        errors = []
        for option in (arg for arg in args if arg is not types.NoneType):
            try:
                return _coerce(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError("; or ".join(errors))
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{where}={shortened(value)}: expected a list or tuple")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={shortened(value)}: expected a mapping")
        return {_key(k, where): _coerce(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return _anything(value, where)
    if hint is float:
        return number(value, where)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}={shortened(value)}: expected {hint.__name__}")
    if hint is str:
        check_text(value, where)
    if hint is int and not -LARGEST_INT <= value <= LARGEST_INT:
        raise ConfigError(f"{where}={shortened(value)}: expected a number of 64 bits")
    return value


def number(value: Any, where: str) -> float:
    """Returns a number as a float. Raises ConfigError for another type, NaN or infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}={shortened(value)}: expected float")
    if not abs(value) <= LARGEST:  # a NaN is not
        raise ConfigError(
            f"{where}={shortened(value)}: expected a finite number, at most {LARGEST}"
        )
    return float(value)


def _anything(value: Any, where: str) -> Any:
    """A value that JSON has a word for, with tuples for its lists."""
    if isinstance(value, Mapping):
        return {_key(k, where): _anything(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_anything(v, f"{where}[{i}]") for i, v in enumerate(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        number(value, where)
        return value
    if isinstance(value, str):
        check_text(value, where)
        return value
    raise ConfigError(f"{where}={shortened(value)}: expected a number, a text, a list or a mapping")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{where} has the key {shortened(key)}: expected text")
    check_text(key, f"a key of {where}")
    return key


def expand_user(path: str | os.PathLike[str], where: str) -> str:
    """A path in which `~` and `~user` are what a shell takes them for. Raises ConfigError."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{where}={expanded!a}: there is no user of that name; expected a path, or "
            f"./{expanded} for a folder that is called so"
        )
    return expanded


def check_text(value: str, where: str) -> None:
    """Raises ConfigError for text that no line of a terminal, a table or a file can hold."""
    for char in value:
        if unicodedata.category(char) in _UNPRINTABLE or char in _TURNS_TEXT:
            raise ConfigError(
                f"{where}={value!a}: holds the character {char!a}; expected one line of text"
            )


def shortened(value: Any) -> str:
    """Returns how an error shows a value, which may be of any kind and length."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
