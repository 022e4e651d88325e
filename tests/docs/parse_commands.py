"""Parses command lines of launch/*.py with their own flags and configs, and runs none of them."""

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

import programs
from absl import flags

from kdq import cli, config, experiment
from kdq.sweep import runs


def check(main, *, required, word=""):
    """In place of `cli.run`."""
    del main
    given = flags.FLAGS
    flags.mark_flags_as_required(required)
    if unknown := cli._parse(sys.argv)[2 if word else 1 :]:
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
    """What is wrong with a command, "" if nothing."""
    script, *arguments = command
    with (
        mock.patch.object(cli, "run", check),
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(output),
    ):
        try:
            mistake = programs.run(Path(script).stem, *arguments)
        except Exception as error:
            mistake = f"{type(error).__name__}: {error}"
    return "" if mistake is None else f"{output.getvalue()}{mistake}" or "failed"
