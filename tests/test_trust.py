"""Workdirs from anywhere: no module is imported because their config.json names it."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kdq import config, experiment, files, trust
from kdq.config import ConfigError
from kdq.experiment import check
from kdq.sweep import runs

ROOT = Path(__file__).parents[1]
SAVED = ROOT / "configs" / "saved" / "workdir.py"
NETS = """
import os
import pathlib
import flax.linen as nn

pathlib.Path(os.environ["IMPORTED"]).write_text("imported")

class Net(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch, data_dir):
    """A workdir whose models are of a module that would tell if it were imported."""
    (tmp_path / "foreign_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("IMPORTED", str(tmp_path / "imported"))
    monkeypatch.setattr(trust, "_allowed", set())
    document = {
        "seeds": [0],
        "data": {"name": "digits", "data_dir": str(data_dir)},
        "models": {"net": {"name": "foreign_nets:Net"}},
        "arms": {"teacher": {"model": "net", "epochs": 1.0}},
    }
    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run" / "config.json", document)
    yield tmp_path / "run"
    sys.modules.pop("foreign_nets", None)


def is_imported(workdir):
    return (workdir.parent / "imported").exists()


MESSAGE = r"run/config.json names the model 'foreign_nets:Net', .* say --allow_models=foreign_nets "


def test_an_export_imports_what_it_is_told_to(theirs):
    for allowed in ((), ("foreign_net", "foreign_nets.more", "os")):
        with pytest.raises(ConfigError, match=MESSAGE) as raised:
            experiment.export(theirs, "teacher", formats=["stablehlo"], allow_models=allowed)
        assert "\n" not in str(raised.value)
    assert not is_imported(theirs)
    with pytest.raises(ConfigError, match=r"has the seeds \[\] of arm 'teacher'"):
        experiment.export(theirs, "teacher", formats=["stablehlo"], allow_models=["foreign_nets"])
    assert is_imported(theirs)


def test_the_config_of_a_workdir_is_not_that_of_a_file(theirs):
    get_config = runpy.run_path(str(SAVED))["get_config"]
    with pytest.raises(ConfigError, match=MESSAGE):
        get_config(str(theirs))
    assert not is_imported(theirs)
    trust.allow(["foreign_nets"])
    assert config.freeze(get_config(str(theirs))).models["net"]["name"] == "foreign_nets:Net"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "5", '{"models": 3}', '{"models": {"a": 3}}', "[" * 10_000]
)
def test_a_damaged_config_of_a_workdir_is_one_line(theirs, text):
    (theirs / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json (is no config of|can't be read as JSON)"):
        runpy.run_path(str(SAVED))["get_config"](str(theirs))


def test_what_is_imported_already_is_trusted(theirs):
    import foreign_nets  # noqa: F401, PLC0415

    with pytest.raises(ConfigError, match=r"has the seeds \[\]"):
        experiment.export(theirs, "teacher", formats=["stablehlo"])


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, f"launch/{script}.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_launchers_import_what_the_command_line_names(theirs):
    saved = f"--config={SAVED}:{theirs}"
    commands = {
        "export": (f"--workdir={theirs}", "--arm=teacher", "--format=stablehlo"),
        "train": (saved, f"--workdir={theirs.parent / 'again'}", "--arm=nowhere"),
    }
    for script, arguments in commands.items():
        answer = run(script, *arguments)
        assert (answer.returncode, answer.stdout) == (1, "")
        assert answer.stderr.startswith("error: ")
        assert answer.stderr.count("\n") == 1
        assert "say --allow_models=foreign_nets " in answer.stderr
    assert not is_imported(theirs)
    for script, arguments in commands.items():
        answer = run(script, *arguments, "--allow_models=x.y,foreign_nets")
        assert answer.returncode == 1
        assert "allow_models" not in answer.stderr
        assert is_imported(theirs)  # and another mistake was met
        (theirs.parent / "imported").unlink()


def test_runs_of_a_sweep_may_import_what_the_sweep_may(theirs):
    trust.allow(["foreign_nets"])
    (planned,) = runs.plan_runs(
        f"{SAVED}:{theirs}", [{"seeds": (3,)}], theirs.parent / "sweep", launch=ROOT / "launch"
    )
    assert "--allow_models=foreign_nets" in planned.job.command


def test_a_class_of_a_script_is_warned_of_before_training(caplog):
    for name in ("cnn", "tests.nets:Net"):
        check.warn_of_script(name, "config.models.net")
    assert not caplog.records
    check.warn_of_script("__main__:Net", "config.models.net")
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("config.models.net: Net is defined in a script or notebook: it trains")
    assert "load_packed(path, Net(...))" in text
    assert "module of its own" in text


SCRIPT = """
import flax.linen as nn
import numpy as np
import kdq

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(2, name="out")(nn.relu(nn.Dense(4, name="first")(x)))

if __name__ == "__main__":
    x = np.random.default_rng(0).normal(size=(192, 3)).astype(np.float32)
    train, validation, test = ((x[i::3], (x[i::3, 0] > 0).astype(np.int32)) for i in range(3))
    splits = {"train": train, "validation": validation, "test": test}
    kdq.compress(Net(), **splits, workdir="run", epochs=2, bits="W8A8")
"""


@pytest.mark.slow
def test_a_script_with_a_class_of_its_own_says_so_first(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    answer = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Net is defined in a script or notebook" in answer.stderr
    with pytest.raises(ConfigError, match="is of another program, a script or notebook"):
        experiment.export(tmp_path / "run", "qad", formats=["stablehlo"])
