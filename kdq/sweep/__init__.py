"""Many runs of one entry point: a sweep's overrides become runs, an engine runs them, one table.

`runs` reads a sweep file and checks every run before any starts; `local`, `ray` and `slurm` are the
engines, imported when they are used; `run` drives one of them; `results` makes the table.
"""

import importlib
from typing import Any

from kdq.fields import ConfigError, unknown
from kdq.sweep.job import Executor

# Where each executor is, and the extra that installs what it needs.
EXECUTORS = {"local": None, "ray": "ray", "slurm": "slurm"}


def executor(name: str, **options: Any) -> Executor:
    """Returns an executor of jobs: a key of EXECUTORS with its options.

    Raises ConfigError for an unknown name, no workers, or if its extra is not installed.
    """
    if name not in EXECUTORS:
        raise ConfigError(unknown("executor", name, EXECUTORS))
    workers = options.get("workers")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers={workers}: expected at least 1")
    try:
        module = importlib.import_module(f"kdq.sweep.{name}")
    except ModuleNotFoundError as error:
        extra = EXECUTORS[name]
        if not extra or (error.name or "").startswith("kdq"):
            raise
        raise ConfigError(
            f"--executor={name} needs {error.name}, which is not installed: "
            f"pip install -e '.[{extra}]'"
        ) from error
    return module.make(**options)
