"""Mistakes of a command line and how they are answered; configs and entry points as shipped."""

import os
import runpy
from pathlib import Path

import pytest
from programs import launcher, refusal

from kdq import config, lock

slow = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def launch(data_dir):
    return launcher(data_dir)


QUICK = "--config=configs/digits.py:quick"
MISTAKES = {
    "key": (
        [QUICK, "--config.data.nam=x"],
        r"error: unknown key in config.data: 'nam' (did you mean 'name'?); valid: augment, ",
    ),
    "argument": (
        ["--config=configs/digits.py:quik"],
        "error: unknown config argument 'quik' (did you mean 'quick'?); valid: quick, seeds",
    ),
    "file": (
        ["--config=configs/digit.py"],
        "error: unknown config file 'configs/digit.py' (did you mean 'configs/digits.py'?); valid:",
    ),
    "data set": ([QUICK, "--config.data.name=digit"], "error: no data set 'digit' in TFDS or in "),
    "arm": (
        [QUICK, "--config.arms.kdd.epochs=0.5"],
        "error: unknown key in config.arms: 'kdd' (did you mean 'kd'?); valid: teacher, ",
    ),
    "value": (
        [QUICK, "--config.arms.kd.label_smoothing=1.5"],
        "error: config.arms.kd.label_smoothing=1.5: expected 0 to below 1",
    ),
    "export": (
        [QUICK, "--config.export.formats=onnx", "--config.export.fixed_point=True"],
        "error: config.export.fixed_point: format 'onnx' has no multipliers in fixed point; ",
    ),
    "type": ([QUICK, "--config.data.batch_size=ten"], "error: flag --config.data.batch_size=ten: "),
    "flag": ([QUICK, "--confg.data.name=x"], "error: Unknown command line flag 'confg.data.name'"),
    "word": ([QUICK, "compress"], "error: unknown arguments: compress"),
    "no file": ([], "error: flag --config=None: Flag --config must have a value other than None."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line(data_dir, monkeypatch, capsys, tmp_path, mistake):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    arguments, message = MISTAKES[mistake]
    answer = refusal("compress", *arguments, f"--workdir={tmp_path / 'run'}")
    assert answer.startswith(message)
    assert "\n" not in answer
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_a_program_that_refuses_says_so_by_its_status(launch, tmp_path):
    arguments, message = MISTAKES["key"]
    process = launch("compress", *arguments, f"--workdir={tmp_path / 'run'}")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith(message)
    assert process.stderr.count("\n") == 1


@slow
@pytest.mark.parametrize("program", ["compress", "train"])
def test_a_second_program_in_a_workdir_is_told_who_holds_it(launch, tmp_path, program):
    """Other arms of the same experiment, too: the arms that both need would be trained twice."""
    more = ("--arm=student",) if program == "train" else ()
    with lock.hold(tmp_path):
        process = launch(program, QUICK, f"--workdir={tmp_path}", *more)
        assert os.listdir(tmp_path) == ["lock"]
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.startswith(f"error: {tmp_path} is in use by process {os.getpid()} of ")
    assert process.stderr.count("\n") == 1


# The configs that kdq ships.


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
@pytest.mark.parametrize("argument", [None, "quick", "seeds=2", "quick,seeds=2"])
def test_shipped_configs_are_valid(path, argument):
    if argument and "quick" in argument and "quick=" not in path.read_text():
        pytest.skip(f"{path.name} has no quick variant")
    experiment = config.freeze(runpy.run_path(str(path))["get_config"](argument))
    if argument and "seeds=2" in argument:
        assert len(experiment.seeds) == 2
    assert experiment.teacher in experiment.arms
    opening = path.read_text().split('"""')[1]
    assert f"--config=configs/{path.name}" in opening  # the command that runs it


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda p: p.stem)
def test_entry_points_only_parse_and_call(path):
    assert len(path.read_text().splitlines()) < 70
