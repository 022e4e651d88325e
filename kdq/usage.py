"""The text of --help: a program's own flags first, by what they are for."""

import re
import sys
import textwrap
from collections.abc import Iterable, Sequence

from absl import flags

WIDTH = 92
ASKED = ("-?", "-h", "-help", "--help", "--h")


def asked(argv: Sequence[str]) -> bool:
    """Returns whether a command line asks for help; --helpfull is absl's."""
    return any(argument in ASKED for argument in argv[1:])


def text(doc: str, required: Sequence[str], shared: Iterable[str]) -> str:
    """The help of a program.

    Args:
      doc: what it does, with its command.
      required: flags that have to be given.
      shared: flags of the same meaning in all programs; they come last.
    """
    defined = {flag.name: flag for flag in flags.FLAGS.get_flags_for_module(sys.argv[0])}
    shared = [name for name in shared if name in defined]
    groups = {
        "required": [name for name in required if name in defined],
        "options": [name for name in defined if name not in (*required, *shared)],
        "where it runs": shared,
    }
    parts = [doc.strip()]
    for title, names in groups.items():
        if names:
            parts.append("\n".join([f"{title}:", *(_flag(defined[name]) for name in names)]))
    if "config" in defined:
        parts.append(
            "fields of the config:\n"
            + _indented(
                "--config.data.batch_size=128 overrides any of them; kdq/schema.py says what there "
                "is, and a name that does not exist is an error that lists the valid ones.",
                "  ",
            )
        )
    return "\n\n".join([*parts, "--helpfull lists the flags of absl, JAX and TFDS too.", ""])


def _flag(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    value = "" if flag.default in (None, [], False, "") else flag.default_as_str.strip("'")
    default = f" Default: {value}." if value else ""
    # Without what absl puts before and after what the program says.
    words = re.sub(r"^<[^>]*>: |;\s+repeat this option.*", "", flag.help, flags=re.DOTALL)
    if isinstance(flag.parser, flags.EnumParser):
        words = f"One of {', '.join(flag.parser.enum_values)}. {words}"
    if isinstance(flag, flags.MultiFlag):
        words += " Can be value several times."
    return f"  {name}\n{_indented(words + default, '      ')}"


def _indented(words: str, indent: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent=indent, subsequent_indent=indent)
