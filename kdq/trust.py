"""Modules that may be imported because a file names them.

A config file that is given on the command line is Python: what it names was chosen by whoever runs
it. The `config.json` of a workdir and a packed file come from anywhere, and importing a module runs
it: only those are imported that are imported already, or that the command line (--allow_models) or
an argument names.
"""

import sys
from collections.abc import Iterable
from typing import Any

from kdq.fields import ConfigError

_allowed: set[str] = set()


def allow(modules: Iterable[str]) -> None:
    """Lets this program import these modules whoever names them: what --allow_models says."""
    _allowed.update(filter(None, modules))


def allowed() -> tuple[str, ...]:
    """Returns the modules that `allow` was called with."""
    return tuple(sorted(_allowed))


def is_trusted(module: str, allow_models: Iterable[str] = ()) -> bool:
    """Returns whether a module is imported already, or may be."""
    return module in sys.modules or module in _allowed or module in set(allow_models)


def check(name: Any, where: str, allow_models: Iterable[str] = ()) -> None:
    """Raises ConfigError if a file, `where`, names a class, "package.module:Class", whose module is
    neither trusted nor among `allow_models`."""
    module, colon, _ = name.partition(":") if isinstance(name, str) else ("", "", "")
    if colon and not is_trusted(module, allow_models):
        raise ConfigError(
            f"{where} names the model {name!r}, and importing {module} would run it: if you trust "
            f"it, say --allow_models={module} (in Python: allow_models=[{module!r}], or import it)"
        )
