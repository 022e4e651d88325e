"""Running programs, watched from outside, and their mistakes, without a process for each."""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

from absl import flags

ROOT = Path(__file__).parents[1]


def refusal(script, *arguments):
    """Returns the line that a program of launch/ ends with, here and now, given these arguments."""
    line = run(script, *arguments)
    assert line is not None, f"{script} {' '.join(map(str, arguments))} ended without a word"
    return line


def run(script, *arguments):
    """Runs a program of launch/ in this process; returns the line of its mistake, else None."""
    others, interrupt = set(flags.FLAGS), signal.getsignal(signal.SIGINT)
    command = [f"launch/{script}.py", *map(str, arguments)]
    try:
        with (
            contextlib.chdir(ROOT),
            mock.patch.object(sys, "argv", command),
            warnings.catch_warnings(),
        ):
            # ml_collections loads a config file by a call that Python advises against.
            warnings.simplefilter("ignore", DeprecationWarning)
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGINT, interrupt)  # a program's second Ctrl-C ends the process
        for name in set(flags.FLAGS) - others:
            delattr(flags.FLAGS, name)
    return None


def launcher(data_dir):
    """Returns what runs a script of launch/ from the root of the repository, in a process."""
    environment = os.environ | {"TFDS_DATA_DIR": str(data_dir)}

    def start(script, *arguments, **options):
        command = [sys.executable, f"launch/{script}.py", *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(command, cwd=ROOT, env=environment, **options)

    def run(script, *arguments):
        with start(script, *arguments) as process:
            output, errors = process.communicate(timeout=550)
        return subprocess.CompletedProcess(script, process.returncode, output, errors)

    run.start = start
    return run


def children(pid):
    """Every process below one, by its id: what `ps` says of it."""
    # Whole lines: without -ww they end at COLUMNS, which CI sets, in the middle of a command.
    command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    found, below = {}, {pid}
    while below:
        new = {int(own): said for own, parent, said in rows if int(parent) in below}
        below = set(new) - set(found)
        found |= new
    return found


def wait_for(condition, process, seconds=120.0, every=0.05):
    """What `condition` gives once that is true, while `process` runs."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < end, "waited too long"
        time.sleep(every)
    return found


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
