"""--help of every entry point: its own flags by what they are for, quickly loaded, nothing else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))

# One process imports what all of them do, and becomes each of them in turn.
DRIVER = """
import os, runpy, sys
from pathlib import Path
import kdq.cli, kdq.experiment
for script in sys.argv[2:]:
    if not (child := os.fork()):
        path = f"launch/{script}.py"
        with Path(sys.argv[1], script).open("w") as out:
            os.dup2(out.fileno(), 1)
            sys.argv = [path, "--help"]
            runpy.run_path(path, run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, script
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("help")
    command = [sys.executable, "-c", DRIVER, folder, *SCRIPTS]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return {script: (folder / script).read_text() for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_grouped_and_none_is_left_out(texts, script):
    source = (ROOT / "launch" / f"{script}.py").read_text()
    groups = re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", texts[script], flags=re.MULTILINE)
    flags = {
        title: re.findall(r"^  --(?:\[no\])?(\w+)$", body, re.MULTILINE) for title, body in groups
    }
    required = re.search(r"required=\[(.*)\]", source)[1]
    assert flags.get("required", []) == re.findall(r'"(\w+)"', required)
    own = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)
    own += [name for name in ("config", "workdir") if f"cli.define_{name}(" in source]
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


# A script that leaves the names of all that it has loaded.
LISTED = """
import atexit, pathlib, runpy, sys
listed, *sys.argv = sys.argv[1:]
atexit.register(lambda: pathlib.Path(listed).write_text(" ".join(sys.modules)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# What only some runs use, each a second or more to import on a slow machine.
LATER = {"tensorflow", "torch", "matplotlib", "plotly", "sklearn", "optuna", "onnx", "onnxruntime"}
LATER |= {"ai_edge_litert", "gymnasium", "ray", "submitit", "pandas", "scipy.stats"}


@pytest.mark.parametrize(
    "script",
    ["compress", *(pytest.param(s, marks=pytest.mark.slow) for s in ("report", "search", "sweep"))],
)
def test_help_succeeds_without_loading_what_only_some_runs_use(script, tmp_path):
    config = ["--config=no/such.py"] if script == "compress" else []
    command = [sys.executable, "-c", LISTED, tmp_path / "loaded", f"launch/{script}.py", *config]
    command.append("--help")
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout
    loaded = set((tmp_path / "loaded").read_text().split())
    assert {"kdq.cli", "jax"} <= loaded
    assert not loaded & LATER


@pytest.mark.slow
def test_more_flags_are_a_flag_away():
    command = [sys.executable, "launch/advise.py", "--helpfull"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "--max_size_kib" in process.stdout
    assert "--verbosity" in process.stdout
