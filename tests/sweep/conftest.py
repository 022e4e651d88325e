"""A config and jobs for the tests of sweeps."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdq.schema import Resources
from kdq.sweep.job import Job

ROOT = Path(__file__).parents[2]

CONFIG = f"""
import runpy

def get_config(arg=None):
    config = runpy.run_path({str(ROOT / "configs" / "digits.py")!r})["get_config"](arg)
    for name in list(config.arms):
        if name not in ("teacher", "student"):
            del config.arms[name]
    del config.resources  # a config need not list them
    return config
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The value of --config: two arms of the digits."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return f"{path}:quick"


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., Job]:
    """Makes a job of some Python."""

    def make(name: str, code: str, **resources: float) -> Job:
        return Job(
            name=name,
            command=(sys.executable, "-c", code),
            folder=tmp_path,
            log=tmp_path / "runs" / name / "log.txt",
            resources=Resources(**resources),
        )

    return make
