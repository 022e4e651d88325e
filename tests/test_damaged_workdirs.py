"""Every JSON file of a finished workdir, cut short and edited: one line, or it is made again.

KDQ_EDITS says how many edits; 500 take about eight minutes.
"""

import json
import os
import random
import shutil

import pytest
from programs import run

# A config that is a file, for a program's --config, with each kind of arm and a search.
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict({config!r}, sort_keys=False)
    return config
"""
VALUES = (
    *(None, True, -1, 0, 1.5, 1e999, 10**400),
    *("x", "", "../../x", [], {}, [1], {"a": 1}),
)
GARBAGE = (b"", b"\xff\xfe\0", b"[]", b"{}", b"null", b"5", b'"x"', b"[" * 3000)
EDITS, PARTS = int(os.environ.get("KDQ_EDITS", "100")), 5


def cut(file, chance):
    """Truncates a file anywhere."""
    contents = file.read_bytes()
    file.write_bytes(contents[: chance.randrange(len(contents) + 1)])


def flip(file, chance):
    """Flips a bit."""
    contents = bytearray(file.read_bytes())
    if contents:
        contents[chance.randrange(len(contents))] ^= 1 << chance.randrange(8)
    file.write_bytes(contents)


def replace(file, chance):
    """Puts something else in its place."""
    file.write_bytes(chance.choice(GARBAGE))


def edit(file, chance, *, sealed=True, drop=False):
    """Changes or drops a value anywhere in it, as an editor would; without its seal it is taken."""
    is_log = file.suffix == ".jsonl"
    lines = file.read_text().splitlines() if is_log else [file.read_text()]
    if not lines:
        return
    i = chance.randrange(len(lines))
    value = json.loads(lines[i])
    if not sealed and isinstance(value, dict):
        value.pop("seal", None)
    holder, key = chance.choice(list(places(value)) or [([None], 0)])
    if drop:
        del holder[key]
    else:
        holder[key] = chance.choice(VALUES)
    lines[i] = json.dumps(value)
    file.write_text("\n".join(lines) + "\n" if is_log else lines[0])


def places(value):
    """Yields each (container, key) of a JSON value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in list(keys):
        yield value, key
        yield from places(value[key])


def drop(file, chance):
    edit(file, chance, drop=True, sealed=chance.random() < 0.5)


def edit_unsealed(file, chance):
    edit(file, chance, sealed=False)


DAMAGES = (cut, flip, replace, edit, edit, drop, drop, edit_unsealed, edit_unsealed, edit_unsealed)


@pytest.fixture(scope="module")
def searched(finished, tmp_path_factory, tiny_config):
    """A finished workdir with a search, and the config file that it is of."""
    folder = tmp_path_factory.mktemp("searched")
    shutil.copytree(finished[1], folder / "run")
    config = tiny_config()
    config["searches"] = {
        "exact": {
            **{"method": "random", "students": ("kd",), "teacher": "teacher"},
            **{"choices": ("W2A8", "W4A8", "W8A8"), "most": {"average_bits": 4.0}},
            **{"evaluations": 4, "examples": 64},
        }
    }
    config["arms"]["searched"] = {"model": "student", "init": "kd", "bits": "exact"}
    (folder / "config.py").write_text(CONFIG.format(config=config))
    flags = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"]
    assert run("compress", *flags) is None
    return folder / "run", folder / "config.py"


def programs(workdir, config, out):
    """The arguments of each program that reads a workdir."""
    return {
        "compress": [f"--config={config}", f"--workdir={workdir}"],
        "report": [f"--workdirs={workdir}", f"--out={out / 'report'}"],
        "advise": [f"--workdirs={workdir}"],
        "export": [
            f"--workdir={workdir}",
            "--arm=qat",
            "--format=packed",
            f"--out={out / 'export'}",
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_damage_ends_in_one_line_or_is_made_again(searched, tmp_path, part):
    """An exception that no line is made of would leave `run`, and fail here."""
    chance = random.Random(part)
    done, config = searched
    files = sorted(path.relative_to(done) for path in done.rglob("*.json*"))
    files = [file for file in files if not {"compiled", "checkpoints"} & set(file.parts)]
    refused = 0
    for number in range(EDITS // PARTS):
        workdir = tmp_path / "run"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(done, workdir, ignore=shutil.ignore_patterns("compiled", "plots"))
        file, damage = chance.choice(files), chance.choice(DAMAGES)
        damage(workdir / file, chance)
        name, arguments = chance.choice(list(programs(workdir, config, tmp_path).items()))
        line = run(name, *arguments)
        message = f"{name} of {file}, number {number}, {damage.__name__}: {line}"
        assert line is None or (isinstance(line, str) and line.startswith("error: ")), message
        assert len(str(line).splitlines()) == 1, message
        refused += line is not None
    assert 0 < refused < EDITS // PARTS


def test_places_are_all_of_a_value():
    value = {"a": [1, {"b": 2}]}
    assert [key for _, key in places(value)] == ["a", 0, 1, "b"]
