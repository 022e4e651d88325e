"""Flags whose values are paths, and command lines that are no text: answered here and now."""

import os

import pytest
from absl import flags
from programs import ROOT, refusal

from kdq import cli

HOME = os.path.expanduser("~")


def _parsed(monkeypatch, define, name, *argv):
    """What a flag holds after a command line was parsed."""
    values = flags.FlagValues()
    monkeypatch.setattr(
        flags, "DEFINE", lambda parser, *rest, **kw: _define(values, parser, *rest, **kw)
    )
    holder = define(name, None, "")
    values(["program", *argv])
    return holder.value


_define = lambda values, *rest, original=flags.DEFINE, **kw: original(
    *rest, flag_values=values, **kw
)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("~/runs", f"{HOME}/runs"),
        ("~", HOME),
        ("runs/~x", "runs/~x"),
        ("./~x", "./~x"),
        ("a b,c", "a b,c"),
    ],
)
def test_a_path_knows_its_users_folder(monkeypatch, given, kept):
    assert _parsed(monkeypatch, cli.define_path, "where", f"--where={given}") == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a,b", ["a", "b"]),
        ("~/a,b", [f"{HOME}/a", "b"]),
        ('"a,b",c', ["a,b", "c"]),
        ("", []),
    ],
)
def test_several_paths(monkeypatch, given, kept):
    assert _parsed(monkeypatch, cli.define_paths, "places", f"--places={given}") == kept


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("report", ["--workdirs=a\nb", "--out=x"], r"error: argument='--workdirs=a\nb': holds"),
        ("report", ["--workdirs=a\udcff", "--out=x"], r"error: argument='--workdirs=a\udcff': "),
        ("report", ["--workdirs=a,,b", "--out=x"], "error: flag --workdirs=a,,b: expected a path"),
        ("report", ["--workdirs=a", "--out="], "error: flag --out=: expected a path"),
        ("report", ['--workdirs="a,b', "--out=x"], "error: flag --workdirs="),
        (
            "report",
            ["--workdirs=~no-such-user/a", "--out=x"],
            "error: flag --workdirs=~no-such-user/a: path='~no-such-user/a': there is no user of",
        ),
        ("report", ['--workdirs="a,b"', "--out=x"], "error: --workdirs: a,b holds no ARM/SEED/"),
        (
            "compress",
            ["--config=~/no-such-config.py", "--workdir=x"],
            f"error: unknown config file '{HOME}/no-such-config.py'",
        ),
        (
            "compress",
            ["--config=configs/digits.py:quick", "--config.data.name=a\nb", "--workdir=x"],
            r"error: argument='--config.data.name=a\nb': holds the character '\n'",
        ),
    ],
)
def test_a_command_line_that_is_no_text_is_refused_in_a_line(script, arguments, message):
    answer = refusal(script, *arguments)
    assert answer.startswith(message)
    assert answer.isprintable()
    assert not (ROOT / "x").exists()
