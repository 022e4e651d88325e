"""What the entry points share: the config flag, and mistakes answered in one line."""

import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from kdq import config, data, deploy, heap

flags.disclaim_key_flags()  # what is defined here is listed under --help of the program itself


MISTAKES = (
    config.ConfigError,
    data.DataError,
    deploy.PackedFileError,
    deploy.ExportError,
    OSError,
)


def define_config() -> flags.FlagHolder:
    """The flag --config=FILE[:ARGUMENT], whose fields are flags too: --config.seeds=0,1."""
    return config_flags.DEFINE_config_file(
        "config", None, "The experiment, e.g. configs/digits.py or configs/digits.py:quick."
    )


def run(main: Callable[[list[str]], None], *, required: Sequence[str]) -> None:
    """Parses the flags, of which some are required, and calls `main` with the program's name.

    A mistake in a flag, a config or the data ends the program with status 1 and one line that says
    what is allowed; any other error keeps its traceback.
    """

    def call(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unknown arguments: {' '.join(argv[1:])}")
        try:
            main(argv)
        except MISTAKES as error:
            sys.exit(f"error: {error}")

    heap.keep_freed_memory()
    flags.mark_flags_as_required(required)
    logging.set_verbosity(logging.WARNING)
    app.run(call, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with a config file that is not there and keys that it lacks explained."""
    path = _config_path(argv)
    file = path.partition(":")[0]
    if path and not Path(file).is_file():
        beside = sorted(map(str, Path(file).parent.glob("*.py")))
        sys.exit(f"error: {config.unknown('config file', file, beside)}")
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # What the config file itself raised arrives wrapped, its traceback as text.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, config.ConfigError) and cause.__context__ is None:
                sys.exit(f"error: {cause}")
            cause = cause.__context__
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError):
        wrong = _unknown_key(argv, path)
        if wrong is None:
            raise
        sys.exit(f"error: {wrong}")


def _config_path(argv: list[str]) -> str:
    """The value of --config, "" if there is none."""
    found = flags.FlagValues()
    flags.DEFINE_string("config", "", "", flag_values=found)
    found(argv, known_only=True)
    return found["config"].value


def _unknown_key(argv: list[str], path: str) -> str | None:
    """What is wrong with the first --config.KEY that the config does not have; None if none is."""
    file, *argument = path.split(":", 1)
    for given in argv[1:]:
        override = re.match(r"--?(?:no)?config\.([^=]+)", given)
        if override is None:
            continue
        place, seen = runpy.run_path(file)["get_config"](*argument), "config"
        for key in override[1].split("."):
            if not hasattr(place, "keys") or key not in place:
                return config.unknown(f"key in {seen}:", key, getattr(place, "keys", list)())
            place, seen = place[key], f"{seen}.{key}"
    return None
