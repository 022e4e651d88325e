"""--help of every entry point: its own flags by what they are for, at once, nothing else."""

import dataclasses
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

slow = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))

# A script that leaves the names of all that it has loaded.
LISTED = """
import atexit, pathlib, runpy, sys
listed, *sys.argv = sys.argv[1:]
atexit.register(lambda: pathlib.Path(listed).write_text(" ".join(sys.modules)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclasses.dataclass
class Answer:
    """How a script answers a command line."""

    status: int
    output: str
    errors: str
    loaded: set[str]  # modules
    seconds: float  # of the processor


def answer(listed, script, *arguments):
    command = [sys.executable, "-c", LISTED, listed, f"launch/{script}.py", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    loaded = set(listed.read_text().split())
    return Answer(process.returncode, process.stdout, process.stderr, loaded, seconds)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("help")
    return {script: answer(folder / script, script, "--help") for script in SCRIPTS}


@pytest.fixture(scope="module")
def texts(answers):
    return {script: one.output for script, one in answers.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_grouped_and_none_is_left_out(texts, script):
    source = (ROOT / "launch" / f"{script}.py").read_text()
    groups = re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", texts[script], flags=re.MULTILINE)
    flags = {
        title: re.findall(r"^  --(?:\[no\])?(\w+)$", body, re.MULTILINE) for title, body in groups
    }
    required = re.search(r"required=\[(.*)\]", source)[1]
    assert flags.get("required", []) == re.findall(r'"(\w+)"', required)
    own = re.findall(r'(?:DEFINE|define)_\w+\(\s*"(\w+)"', source)
    own += [name for name in ("config", "workdir") if f"cli.define_{name}(" in source]
    if "cli.define_config(" in source or "cli.define_allow_models(" in source:
        own.append("allow_models")
    shown = [name for names in flags.values() for name in names]
    shared = flags.get("where it runs", [])
    assert sorted(shown) == sorted([*own, *shared])
    assert bool(shared) == ("cli.define_workdir(" in source)
    if shared:
        assert shared[0] == "compilation_cache_dir"
    text = texts[script]
    assert text.startswith(source.strip("r").split('"""')[1].strip().splitlines()[0])
    assert f"python launch/{script}.py --" in text
    assert ("configs/digits.py:quick,seeds=3" in text) == ("config" in shown)
    assert "verbosity" not in text
    assert max(map(len, text.splitlines())) <= 104


HEAVY = {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "numpy", "rich"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(answers, script):
    one = answers[script]
    assert (one.status, one.errors) == (0, "")
    assert "kdq.cli" in one.loaded
    assert not one.loaded & HEAVY
    assert one.seconds < 1


MISTAKES = {
    "help of what is not there": (("--config=no/such.py", "--help"), 0, ""),
    "mistyped flag": (
        ("--confg=configs/digits.py",),
        1,
        "error: Unknown command line flag 'confg'. Did you mean: config ?\n",
    ),
    "flag left out": (
        ("--config=configs/digits.py",),
        1,
        "error: flag --workdir=None: Flag --workdir must have a value other than None.\n",
    ),
    "no such config": (
        ("--config=configs/digit.py", "--workdir=unused"),
        1,
        "error: unknown config file 'configs/digit.py' (did you mean 'configs/digits.py'?); valid",
    ),
    "unknown key": (
        ("--config=configs/digits.py", "--workdir=unused", "--config.evaluatins=3"),
        1,
        "error: unknown key in config: 'evaluatins' (did you mean 'evaluations'?); valid: ",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_the_command_line_are_answered_at_once(tmp_path, mistake):
    arguments, status, message = MISTAKES[mistake]
    one = answer(tmp_path / "loaded", "compress", *arguments)
    assert one.status == status
    assert one.errors.startswith(message)
    assert one.errors.count("\n") == status
    assert "jax" not in one.loaded


# What only some runs use, each a second or more to import on a slow machine.
LATER = {"tensorflow", "torch", "matplotlib", "plotly", "sklearn", "optuna", "onnx", "onnxruntime"}
LATER |= {"ai_edge_litert", "gymnasium", "ray", "submitit", "pandas", "scipy.stats"}


CONFIG = ("--config=configs/digits.py", "--config.arms.kd.label_smoothing=2.0")
# Mistakes that are seen when a program has begun.
BEGUN = {
    "compress": (*CONFIG, "--workdir=unused", "--grain_py_debug_mode"),  # a library's own flag
    "report": ("--workdirs=no/such", "--out=unused"),
    "search": (*CONFIG, "--workdir=unused"),
    "sweep": (*CONFIG, "--workdir=unused", "--sweep=configs/sweeps/bits.py"),
}


@pytest.mark.parametrize(
    "script", ["compress", *(pytest.param(s, marks=slow) for s in BEGUN if s != "compress")]
)
def test_what_only_some_runs_use_is_not_loaded_before(tmp_path, script):
    one = answer(tmp_path / "loaded", script, *BEGUN[script])
    assert one.status == 1
    wrong = "--workdirs: no/such holds" if script == "report" else "config.arms.kd.label_smoothing="
    assert one.errors.startswith("error: ")
    assert wrong in one.errors
    assert one.errors.count("\n") == 1
    assert "jax" in one.loaded
    assert not one.loaded & LATER


@slow
def test_more_flags_are_a_flag_away():
    command = [sys.executable, "launch/advise.py", "--helpfull"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "--max_size_kib" in process.stdout
    assert "--verbosity" in process.stdout
    assert "--[no]grain_py_debug_mode" in process.stdout  # a library's own
