"""Runs of a sweep: their commands, and that all are checked before any starts."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from kdq.config import ConfigError, Resources
from kdq.sweep import runs

LAUNCH = Path(__file__).parents[2] / "launch"


def planned(config, *sweep, **options):
    return runs.plan_runs(config, sweep, Path("work"), launch=LAUNCH, **options)


def test_a_run_is_a_command_with_its_overrides_as_flags(config):
    (run,) = planned(
        config,
        {
            "seeds": (3,),
            "arms.student.learning_rate": np.float64(0.5),
            "data.name": "digits",
            "arms.student.augment": False,
        },
    )
    folder = Path("work/runs/learning_rate=0.5,name=digits,augment=False,seeds=3")
    assert run.folder == folder
    assert run.job.command == (
        sys.executable,
        str(LAUNCH / "compress.py"),
        f"--config={config}",
        "--config.seeds=(3,)",
        "--config.arms.student.learning_rate=0.5",
        "--config.data.name=digits",
        "--config.arms.student.augment=False",
        "--config.workers=1",
        f"--workdir={folder.absolute()}",
        f"--shared={Path('work/shared').absolute()}",
    )
    assert run.job.log == folder.absolute() / "log.txt"
    assert run.experiment.seeds == (3,)
    assert run.experiment.arms["student"].learning_rate == 0.5
    assert not run.experiment.arms["student"].augment
    assert run.arms == ["teacher", "student"]


def test_what_all_runs_share_is_passed_on_and_not_in_their_names(config):
    shared = {"evaluations": 2, "data.batch_size": 32}
    (run,) = planned(config, {"evaluations": 3}, shared=shared)
    assert run.name == "evaluations=3"
    assert run.overrides == {"evaluations": 3}
    given = [flag for flag in run.job.command if flag.startswith("--config.")]
    assert given[:-1] == ["--config.evaluations=3", "--config.data.batch_size=32"]
    assert run.experiment.evaluations == 3
    assert run.experiment.data.batch_size == 32


def test_one_arm_is_run_by_the_other_entry_point(config):
    (run,) = planned(config, {}, arm="teacher")
    assert run.job.command[1] == str(LAUNCH / "train.py")
    assert run.job.command[-1] == "--arm=teacher"
    assert run.arms == ["teacher"]


def test_resources_are_for_the_executor_alone(config):
    plain, asks = planned(
        config,
        {"seeds": (0,)},
        {"seeds": (1,), "resources.cpus": 2, "resources.memory_gib": 1},
        shared={"resources.minutes": 5},
    )
    assert plain.job.resources == Resources(minutes=5)
    assert asks.job.resources == Resources(cpus=2, memory_gib=1.0, minutes=5)
    assert asks.name == "base,seeds=1"
    assert not any(word.startswith("--config.resources") for word in asks.job.command)
    assert asks.digest == plain.digest


def test_runs_of_other_overrides_have_other_digests_and_labels(config):
    sweep = [{"evaluations": n, "seeds": (s,)} for n in (2, 3) for s in (0, 1)]
    found = planned(config, *sweep)
    assert [run.label for run in found] == ["evaluations=2"] * 2 + ["evaluations=3"] * 2
    assert found[0].digest == found[1].digest != found[2].digest == found[3].digest


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ([{"data.nam": "x"}], "unknown key in config.data: 'nam' (did you mean 'name'?); valid: "),
        ([{"resources.cpu": 1}], "run base: unknown key in config.resources: 'cpu' (did you mean"),
        ([{"resources.cpus": -1}], "config.resources.cpus=-1: expected at least 0"),
        ([{}, {"evaluations": "many"}], "run evaluations=many: flag --config.evaluations=many: "),
        (
            [{"arms.student.label_smoothing": 1.5}],
            "student.label_smoothing=1.5: expected",
        ),
        (
            [{"arms.student": {"epochs": 1.0}}],
            "its fields one by one, as config.arms.student",
        ),
        (
            [{"arms.teacher.epochs": 1.0}, {"arms.student.epochs": 1.0}],
            "two runs are called 'epochs=1.0'",
        ),
        (
            [{"seeds": (0, 1)}, {"seeds": (1, 2)}],
            "runs base,seeds=0-1 and base,seeds=1-2 are the same with seed 1",
        ),
    ],
)
def test_a_mistake_in_any_run_is_found_at_once(config, sweep, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        planned(config, *sweep)


def test_an_unknown_arm_is_an_error(config):
    with pytest.raises(ConfigError, match="unknown arm 'studnt'"):
        planned(config, {}, arm="studnt")


def test_a_sweep_file_is_read_with_its_argument(tmp_path):
    path = tmp_path / "some.py"
    path.write_text("def get_sweep(arg='0'):\n    yield {'seeds': (int(arg),)}\n")
    assert runs.read(str(path)) == [{"seeds": (0,)}]
    assert runs.read(f"{path}:7") == [{"seeds": (7,)}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def sweep(): ...", "it has no function get_sweep"),
        ("def get_sweep(): yield 3", "run 0 is 3: expected a dict of overrides"),
        ("def get_sweep(): return []", "get_sweep yields nothing"),
    ],
)
def test_a_file_that_is_no_sweep_is_an_error(tmp_path, text, message):
    path = tmp_path / "some.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        runs.read(str(path))


def test_a_missing_sweep_file_names_those_beside_it(tmp_path):
    (tmp_path / "bits.py").touch()
    with pytest.raises(ConfigError, match=r"unknown sweep file .*bit\.py.*valid: .*bits\.py"):
        runs.read(str(tmp_path / "bit.py"))


@pytest.mark.parametrize(("name", "count"), [("temperature", 12), ("bits", 4)])
def test_the_shipped_sweeps_are_runs_of_the_digits(name, count):
    root = LAUNCH.parent
    sweep = runs.read(str(root / "configs" / "sweeps" / f"{name}.py"))
    found = planned(str(root / "configs" / "digits.py"), *sweep)
    assert len({run.folder for run in found}) == count
