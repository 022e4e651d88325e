"""The origin of numbers: the commit, the package versions, the device."""

import functools
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("kdq", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@functools.cache
def commit() -> str:
    """The commit of this source tree, with "-dirty" after it if files differ; else "unknown"."""
    here = Path(__file__).resolve().parent
    git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
    try:
        if git(["git", "ls-files", Path(__file__).name]).stdout == "":
            return "unknown"  # installed inside somebody else's repository
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES}


@functools.cache
def device() -> str:
    """The accelerators in words, e.g. "1 × NVIDIA H100", or the processor with its cores."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} × {devices[0].device_kind}"
    cores = len(os.sched_getaffinity(0))
    return f"{processor()}, {cores} core{'s' if cores > 1 else ''}"


@functools.cache
def processor() -> str:
    """Returns the processor in words."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_digest() -> str:
    """Returns a name for folders of compiled programs, which run on equal processors alone.

    Virtual machines give one name to processors of different instruction sets, so these count too.
    """
    return hashlib.sha256(f"{processor()} {_cpuinfo('flags')}".encode()).hexdigest()[:8]


def _cpuinfo(field: str) -> str:
    """Returns a field of the first processor that Linux lists, "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
