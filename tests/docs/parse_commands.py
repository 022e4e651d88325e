"""Parses command lines of launch/*.py with their own flags and configs, and runs none of them.

python parse_commands.py FILE, a JSON list of [script, flag, ...]; prints a JSON list of what is
wrong with each, "" if nothing. One process imports kdq and becomes each program in turn.
"""

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

from absl import flags

from kdq import cli, config, experiment
from kdq.sweep import runs


def check(main, *, required):
    """In place of `cli.run`."""
    del main
    given = flags.FLAGS
    flags.mark_flags_as_required(required)
    if unknown := cli._parse(sys.argv)[1:]:
        sys.exit(f"unknown arguments: {unknown}")
    if "config" in given:
        checked = config.freeze(given.config)
        if Path(sys.argv[0]).stem == "search":
            name = given.name or given.config.search.method
            checked = experiment.with_search(checked, "nowhere", name)
        if "arm" in given and given.arm and given.arm not in checked.arms:
            sys.exit(config.unknown("arm", given.arm, checked.arms))
    if "sweep" in given and not runs.read(given.sweep):
        sys.exit(f"{given.sweep} has no runs")
    for path in given.records if "records" in given else ():
        if not Path(path).is_file():
            sys.exit(f"no {path}")


def problem(command: list[str]) -> str:
    """What is wrong with a command, in a process of its own."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = command
            status = 1
            try:
                runpy.run_path(command[0], run_name="__main__")
                status = 0
            except SystemExit as error:
                print(error.code)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        return (output.read().strip() or "failed") if status else ""


if __name__ == "__main__":
    cli.run = check
    print(json.dumps([problem(command) for command in json.loads(Path(sys.argv[1]).read_text())]))
