"""The name of a run: a folder's name that says which overrides it has."""

import re
from collections.abc import Mapping
from typing import Any

from kdq.fields import ConfigError

LONGEST = 200  # characters; file systems allow 255


def label(overrides: Mapping[str, Any], name: str = "") -> str:
    """`{"distill.kd.terms.kl.temperature": 4.0, "seeds": (3,)}` -> "temperature=4.0".

    Runs of one label differ in nothing but their seeds. Without overrides it is "base".

    Args:
      overrides: values by dotted path.
      name: says it better than the overrides do; "" has no say.

    Raises:
      ConfigError: a name that is no folder's, or one too long.
    """
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+=,.\-]*", name):
        raise ConfigError(
            f"run name {name!r} is a folder: expected letters, digits, _ + = , . - and a letter or "
            "digit first"
        )
    said = [_said(path, value) for path, value in overrides.items() if path != "seeds"]
    return _checked(name or ",".join(said) or "base")


def folder(overrides: Mapping[str, Any], name: str = "") -> str:
    """The label with the seeds: "temperature=4.0,seeds=3"."""
    seeds = [_said("seeds", overrides["seeds"])] if "seeds" in overrides else []
    return _checked(",".join([label(overrides, name), *seeds]))


def _said(path: str, value: Any) -> str:
    values = value if isinstance(value, tuple | list) else [value]
    text = "-".join(map(str, values))
    return re.sub(r"[^A-Za-z0-9_+=.\-]+", "-", f"{path.rpartition('.')[2]}={text}")


def _checked(name: str) -> str:
    if len(name) > LONGEST:
        raise ConfigError(f'run name {name!r} is too long: expected a "name" beside the overrides')
    return name
