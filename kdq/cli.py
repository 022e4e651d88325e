"""What the entry points share: the config flag, and mistakes answered in one line."""

import contextlib
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from kdq import config, data, deploy, heap, interrupts, lock, processes, provenance, usage

flags.disclaim_key_flags()  # what is defined here is listed under --help of the program itself


WHERE = (
    "compilation_cache_dir",
    "distributed",
    "coordinator_address",
    "num_processes",
    "process_id",
)
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
        "config",
        None,
        "FILE or FILE:ARGUMENT, the experiment: a Python file with get_config(), and what it is "
        "given. --config=configs/digits.py:quick,seeds=3",
    )


def define_workdir(help_text: str) -> flags.FlagHolder:
    """The flag --workdir, and those of a program that trains in it: where compiled programs are
    kept, and which processes take part."""
    folder = "Folder that keeps compiled programs for the next run; else WORKDIR/compiled."
    flags.DEFINE_string("compilation_cache_dir", None, folder)
    flags.DEFINE_boolean(
        "distributed", False, "Join the other processes of this Slurm step, Kubernetes job, ...."
    )
    flags.DEFINE_string("coordinator_address", None, "Elsewhere: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "With it: how many there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "With it: which this is, from 0.", lower_bound=0)
    return flags.DEFINE_string("workdir", None, help_text)


def run(main: Callable[[list[str]], None], *, required: Sequence[str]) -> None:
    """Parses the flags, of which some are required, and calls `main` with the program's name.

    A mistake in a flag, a config or the data ends the program with status 1 and one line that says
    what is allowed, Ctrl-C with 130 and one line; any other error keeps its traceback.
    """

    def call(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unknown arguments: {' '.join(argv[1:])}")
        try:
            interrupts.end_at_second(_interrupted())
            with _workdir():
                main(argv)
        except MISTAKES as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print(_interrupted(), file=sys.stderr)
            sys.exit(interrupts.STATUS)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            processes.leave(error)

    if usage.asked(sys.argv):
        print(usage.text(sys.modules["__main__"].__doc__, required, WHERE), end="")
        return
    heap.keep_freed_memory()
    flags.mark_flags_as_required(required)
    logging.set_verbosity(logging.WARNING)
    app.run(call, flags_parser=_parse)


def _interrupted() -> str:
    on = ": the same command again goes on from here" if "workdir" in flags.FLAGS else ""
    return f"interrupted{on}"


@contextlib.contextmanager
def _workdir() -> Iterator[None]:
    """Makes ready what `define_workdir` is about, and holds the folder meanwhile."""
    if "compilation_cache_dir" not in flags.FLAGS:
        yield
        return
    _prepare()
    with lock.hold(flags.FLAGS.workdir):
        yield


def _prepare() -> None:
    given = flags.FLAGS
    if given.distributed or given.coordinator_address:
        try:
            processes.start(given.coordinator_address, given.num_processes, given.process_id)
        except ValueError as error:
            sys.exit(f"error: --distributed, --coordinator_address and the like: {error}")
    if jax.config.jax_compilation_cache_dir and not given.compilation_cache_dir:
        return  # by JAX's own environment variables
    folder = Path(given.compilation_cache_dir or Path(given.workdir) / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder / provenance.processor_digest()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # A full disk is said by what else is written; this would be said for every program.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache.*No space left")
    # XLA's own caches would make the folder's path a part of what programs are found by.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


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
