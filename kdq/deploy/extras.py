"""Libraries that only some users need."""

import importlib
from types import ModuleType


def load(extra: str, *names: str) -> tuple[ModuleType, ...]:
    """Imports the modules `names`, which `pip install 'kdq[EXTRA]'` installs.

    Raises:
      ImportError: one of them is missing; says how to install it.
    """
    try:
        return tuple(importlib.import_module(name) for name in names)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed, which this needs: pip install 'kdq[{extra}]'"
        ) from error
