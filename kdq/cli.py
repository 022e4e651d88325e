"""Shared parts of the entry points: the config flag, and mistakes answered in one line.

An entry point imports at its top what defines its flags, and in `main` what needs JAX, so that
--help and most mistakes are answered at once; nor does this file import JAX before a program runs.
"""

import contextlib
import importlib
import re
import runpy
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from kdq import config, heap, interrupts, trust
from kdq.fields import ConfigError, Mistake, check_text, expand_user

flags.disclaim_key_flags()  # what is defined here is listed under --help of the program itself


# Flags of the same meaning in all programs; they come last in the help.
WHERE = (
    "compilation_cache_dir",
    "distributed",
    "coordinator_address",
    "num_processes",
    "process_id",
)
WIDTH = 92  # of the help's text
HELP = ("-?", "-h", "-help", "--help", "--h")  # --helpfull is absl's


def define_config() -> flags.FlagHolder:
    """The flag --config=FILE[:ARGUMENT], whose fields are flags too: --config.seeds=0,1; and
    --allow_models, since a file may hand on the config of a workdir."""
    define_allow_models()
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "FILE or FILE:ARGUMENT, the experiment: a Python file with get_config(), and what it is "
        "given. --config=configs/digits.py:quick,seeds=3",
    )


class _PathParser(flags.ArgumentParser):
    """A file or folder: `~` is the user's own folder, which shells leave in --workdir=~/runs."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if not argument:
            raise ValueError("expected a path")
        try:
            return expand_user(argument, "path")
        except ConfigError as error:
            reason = str(error)
        raise ValueError(reason)  # out here, or it would be the context, and said without the flag


class _PathsParser(flags.ListParser):
    """Paths with commas between them; one with a comma of its own stands in quotes."""

    def parse(self, argument: str | list[str]) -> list[str]:
        return [_PathParser().parse(path) for path in super().parse(argument)]


def define_path(name: str, default: str | None, help_text: str) -> flags.FlagHolder:
    """A flag whose value is a file or folder."""
    return flags.DEFINE(_PathParser(), name, default, help_text)


def define_paths(name: str, default: list[str] | None, help_text: str) -> flags.FlagHolder:
    """A flag whose value is several of them."""
    words = f"{help_text} One with a comma in its name stands in double quotes."
    serializer = flags.CsvListSerializer(",")
    return flags.DEFINE(_PathsParser(), name, default, words, serializer=serializer)


def define_allow_models() -> None:
    """The flag --allow_models, whose modules `kdq.trust` has before any config is read."""
    flags.DEFINE_multi_string(
        "allow_models",
        [],
        "Modules, a.b,c.d, that may be imported because a workdir names models in them.",
    )


def define_workdir(help_text: str) -> flags.FlagHolder:
    """The flag --workdir, and those of a program that trains in it: where compiled programs are
    kept, and which processes take part."""
    folder = "Folder that keeps compiled programs for the next run; else WORKDIR/compiled."
    define_path("compilation_cache_dir", None, folder)
    flags.DEFINE_boolean(
        "distributed", False, "Join the other processes of this Slurm step, Kubernetes job, ...."
    )
    flags.DEFINE_string("coordinator_address", None, "Elsewhere: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "With it: how many there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "With it: which this is, from 0.", lower_bound=0)
    return define_path("workdir", None, help_text)


def run(main: Callable[[list[str]], None], *, required: Sequence[str], word: str = "") -> None:
    """Parses the flags, of which some are required, and calls `main` with the program's name.

    A `word`, "NETWORK", stands on the command line without a flag, and is passed on too.

    A mistake in a flag, a config or the data ends the program with status 1 and one line that says
    what is allowed, Ctrl-C with 130 and one line; any other error keeps its traceback.
    """

    def call(argv: list[str]) -> None:
        if unknown_words := argv[2 if word else 1 :]:
            sys.exit(f"error: unknown arguments: {' '.join(unknown_words)}")
        if word and len(argv) < 2:
            sys.exit(f"error: expected {word} after {Path(argv[0]).name}; --help says more")
        try:
            interrupts.end_at_second(_interrupted())
            with _workdir():
                main(argv)
        except (Mistake, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print(_interrupted(), file=sys.stderr)
            sys.exit(interrupts.STATUS)
        except RuntimeError as error:
            from kdq import processes

            processes.leave_if_lost(error)
            raise

    if any(argument in HELP for argument in sys.argv[1:]):
        print(_help_text(sys.modules["__main__"].__doc__, required), end="")
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
    from kdq import lock

    _prepare()
    with lock.hold(flags.FLAGS.workdir):
        yield


def _prepare() -> None:
    """Does what the flags of `define_workdir` say."""
    import jax

    from kdq import processes, provenance

    values = flags.FLAGS
    if values.distributed or values.coordinator_address:
        try:
            processes.start(values.coordinator_address, values.num_processes, values.process_id)
        except ValueError as error:
            sys.exit(f"error: --distributed, --coordinator_address and the like: {error}")
    if jax.config.jax_compilation_cache_dir and not values.compilation_cache_dir:
        return  # by JAX's own environment variables
    folder = Path(values.compilation_cache_dir or Path(values.workdir) / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder / provenance.processor_digest()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # A full disk is said by what else is written; this would be said for every program.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache.*No space left")
    # XLA's own caches would make the folder's path a part of what programs are found by.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with a config file that is not there and keys that it lacks explained."""
    argv = list(argv)
    try:
        for i, argument in enumerate(argv):
            check_text(argument, "argument")
            flag, _, value = argument.partition("=")
            if flag in ("--config", "-config"):
                argv[i] = f"{flag}={expand_user(value, flag)}"
    except ConfigError as error:
        sys.exit(f"error: {error}")
    trust.allow(m for text in _values(argv, "allow_models") for m in text.split(","))
    path = (_values(argv, "config") or [""])[-1]
    file = path.partition(":")[0]
    if path and not Path(file).is_file():
        neighbours = sorted(map(str, Path(file).parent.glob("*.py")))
        sys.exit(f"error: {config.unknown('config file', file, neighbours)}")
    if _names_libraries(argv):
        importlib.import_module("kdq.experiment")
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
        file, *argument = path.split(":", 1)
        overrides = [re.match(r"--?(?:no)?config\.([^=]+)", each) for each in argv[1:]]
        for key in (match[1] for match in overrides if match):
            try:
                config.at_path(runpy.run_path(file)["get_config"](*argument), key)
            except ConfigError as error:
                sys.exit(f"error: {error}")
        raise


def _values(argv: list[str], name: str) -> list[str]:
    """The values of a flag, before the others are parsed; [] if there is none."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string(name, [], "", flag_values=values)
    values(argv, known_only=True)
    return values[name].value


def _names_libraries(argv: list[str]) -> bool:
    """Returns whether flags are meant that libraries define, which they do as they are imported."""
    names = [re.match(r"--?([^=]*)", argument) for argument in argv[1:]]
    for name in [match[1] for match in names if match]:
        if name in ("helpfull", "helpxml", "flagfile"):
            return True
        known = name in flags.FLAGS or name.removeprefix("no") in flags.FLAGS
        mistyped = config.did_you_mean(name, flags.FLAGS)
        if not (known or mistyped or name.startswith(("config.", "noconfig."))):
            return True
    return False


def _help_text(doc: str, required: Sequence[str]) -> str:
    """Returns the text of --help: a program's own flags first, by what they are for."""
    defined = {flag.name: flag for flag in flags.FLAGS.get_flags_for_module(sys.argv[0])}
    groups = {
        "required": [name for name in required if name in defined],
        "options": [name for name in defined if name not in (*required, *WHERE)],
        "where it runs": [name for name in WHERE if name in defined],
    }
    parts = [doc.strip()]
    for title, names in groups.items():
        if names:
            parts.append("\n".join([f"{title}:", *(_describe(defined[name]) for name in names)]))
    if "config" in defined:
        words = (
            "--config.data.batch_size=128 overrides any of them; kdq/schema.py says what there is, "
            "and a name that does not exist is an error that lists the valid ones."
        )
        parts.append(f"fields of the config:\n{_indented(words, '  ')}")
    return "\n\n".join([*parts, "--helpfull lists the flags of absl, JAX and TFDS too.", ""])


def _describe(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    value = "" if flag.default in (None, [], False, "") else flag.default_as_str.strip("'")
    default = f" Default: {value}." if value else ""
    # Without what absl puts before and after what the program says.
    words = re.sub(r"^<[^>]*>: |;\s+repeat this option.*", "", flag.help, flags=re.DOTALL)
    if isinstance(flag.parser, flags.EnumParser):
        words = f"One of {', '.join(flag.parser.enum_values)}. {words}"
    if isinstance(flag, flags.MultiFlag):
        words += " Can be given several times."
    return f"  {name}\n{_indented(words + default, '      ')}"


def _indented(words: str, indent: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent=indent, subsequent_indent=indent)
