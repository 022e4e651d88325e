"""Arms and seeds in several processes: in an order that works, once each, the same numbers."""

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import same_but_for_rounding

from kdq import config, experiment
from kdq.config import ConfigError
from kdq.experiment import parallel
from kdq.record import ArmRecord

ORDER = ("teacher", "student", "kd", "ptq", "qat", "qad")
# What an arm of `tiny_config` is made of, and the teacher that it is compared with.
NEEDED = {
    "teacher": [],
    "student": ["teacher"],
    "kd": ["teacher"],
    "ptq": ["student", "teacher"],
    "qat": ["student", "teacher"],
    "qad": ["kd", "teacher"],
}


class Heard(experiment.Progress):
    def __init__(self):
        self.total, self.done_, self.others = 0, [], {}

    def start(self, steps):
        self.total = len(steps)

    def beside(self, process):
        return self.others.setdefault(process, Heard.Arms())

    def done(self, record):
        self.done_.append((record.arm, record.seed))

    class Arms(experiment.Progress):
        def __init__(self):
            self.arms, self.prepared, self.stages = [], [], []

        def prepare(self, name, seed):
            self.prepared.append((name, seed))

        def arm(self, name, seeds, steps):
            self.arms.append((name, *seeds))

        def stage(self, description, done, total):
            self.stages.append((description, done, total))


# What processes are given to run, in place of arms: a line in a file at either end.


def noting(_, workdir, progress, *, wrong=None, seconds=0.05):
    def note(what, name, seed):
        line = {"what": what, "unit": (name, seed), "pid": os.getpid()}
        line["cores"] = sorted(os.sched_getaffinity(0))
        with open(workdir / "log", "a") as file:
            file.write(json.dumps(line) + "\n")

    def one(name, seed):
        progress.prepare(name, seed)
        assert list(progress.method("xyz", f"calibrating {name}")) == ["x", "y", "z"]
        progress.arm(name, [seed], 1)
        note("begins", name, seed)
        time.sleep(seconds)
        if wrong and (name, seed) == ("kd", 1):
            wrong()
        note("ends", name, seed)
        return ArmRecord(arm=name, seed=seed)

    return one


def refuse():
    raise ConfigError("there is no such thing")


def vanish():
    os.kill(os.getpid(), signal.SIGKILL)


def in_two(one, workdir, missing, progress=None, **options):
    make = functools.partial(noting, one, workdir, **options)
    progress = progress or experiment.Progress()
    parallel.run(one, ORDER, missing, 2, make=make, progress=progress)


def noted(workdir):
    lines = map(json.loads, (workdir / "log").read_text().splitlines())
    return [line | {"unit": tuple(line["unit"])} for line in lines]


@pytest.fixture
def seeds(tiny_experiment):
    return dataclasses.replace(tiny_experiment, seeds=(0, 1))


def test_an_arm_needs_what_it_is_made_of_and_the_teacher(tiny_experiment):
    found = parallel.needs(tiny_experiment, ORDER, 3)
    assert {name: set(own) for (name, _), own in found.items()} == {
        name: {(one, 3) for one in own} for name, own in NEEDED.items()
    }


def test_a_teacher_does_not_wait_for_itself(tiny_experiment):
    own = dataclasses.replace(tiny_experiment, teacher="qad")
    found = parallel.needs(own, ("teacher", "kd", "qad", "student"), 0)
    assert found["kd", 0] == [("teacher", 0)]
    assert set(found["qad", 0]) == {("kd", 0), ("teacher", 0)}
    assert found["student", 0] == [("qad", 0)]


def test_arms_of_one_search_wait_for_each_other(tiny_config):
    changed = tiny_config()
    for name in ("ptq", "qat", "qad"):
        changed["arms"][name]["bits"] = "found"
        changed["arms"][name]["init"] = "student"
    most = {"average_bits": 3.0}
    changed["searches"] = {"found": {"students": ("student",), "teacher": "teacher", "most": most}}
    one = config.freeze(changed)
    found = parallel.needs(one, ORDER, 0)
    assert ("ptq", 0) in found["qat", 0]
    assert ("qat", 0) in found["qad", 0]


def test_each_runs_once_after_what_it_needs_on_cores_of_its_own(seeds, tmp_path):
    missing = {(name, seed) for name in ORDER for seed in (0, 1)} - {("teacher", 0)}
    heard = Heard()
    in_two(seeds, tmp_path, missing, heard)
    lines = noted(tmp_path)
    ended = [line["unit"] for line in lines if line["what"] == "ends"]
    assert sorted(ended) == sorted(heard.done_) == sorted(missing)
    over = {("teacher", 0)}
    for line in lines:
        name, seed = line["unit"]
        if line["what"] == "begins":
            assert {(one, seed) for one in NEEDED[name]} <= over
        else:
            over.add((name, seed))
    told = [unit for other in heard.others.values() for unit in other.arms]
    assert sorted(told) == sorted(missing)
    assert sorted(u for other in heard.others.values() for u in other.prepared) == sorted(missing)
    stages = [stage for other in heard.others.values() for stage in other.stages]
    begun = [(f"calibrating {name}", 0, 3) for name, _ in missing]
    assert sorted(stage for stage in stages if stage[1] == 0) == sorted(begun)
    # A process that has begun a seed goes on with it.
    processes = {}
    for line in lines:
        processes.setdefault(line["pid"], []).append(line)
    assert len(processes) == 2
    assert {own[0]["unit"][1] for own in processes.values()} == {0, 1}
    for own in processes.values():
        of_seeds = [line["unit"][1] for line in own]
        assert np.count_nonzero(np.diff(of_seeds)) <= 1
    if len(os.sched_getaffinity(0)) > 1:
        shares = [set(own[0]["cores"]) for own in processes.values()]
        assert not shares[0] & shares[1]
        assert shares[0] | shares[1] == os.sched_getaffinity(0)
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (refuse, ConfigError, r"^there is no such thing$"),
        (vanish, ChildProcessError, r"was killed.*the same command again goes on"),
    ],
)
def test_what_goes_wrong_in_one_ends_all_and_is_raised(seeds, tmp_path, wrong, error, message):
    missing = {(name, seed) for name in ORDER for seed in (0, 1)}
    with pytest.raises(error, match=message):
        in_two(seeds, tmp_path, missing, wrong=wrong)
    assert not multiprocessing.active_children()
    assert ("kd", 1) not in [line["unit"] for line in noted(tmp_path) if line["what"] == "ends"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, min(3, len(os.sched_getaffinity(0)))),
        ({"seeds": (0,)}, 1),
        ({"workers": 1}, 1),
        ({"seeds_at_once": 2}, 1),
        ({"mesh": {"data": -1}}, 1),
        ({"export": {"latency_batches": (1,)}}, 1),
    ],
    ids=str,
)
def test_how_many_processes(tiny_config, changed, expected):
    one = config.freeze({**tiny_config(), "seeds": (0, 1, 2), **changed})
    assert parallel.workers(one) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"workers": 2, "seeds_at_once": 2},
        {"workers": 2, "mesh": {"data": 2}},
        {"workers": 2, "export": {"latency_batches": (1,)}},
    ],
    ids=str,
)
def test_processes_that_can_not_be(tiny_config, changed):
    one = config.freeze({**tiny_config(), **changed})
    with pytest.raises(ConfigError, match=r"config.workers=2: expected at most 1 with a mesh"):
        parallel.workers(one)


@pytest.mark.parametrize("more", [1, 10**6])
def test_no_more_processes_than_cores(tiny_config, more):
    cores = len(os.sched_getaffinity(0))
    one = config.freeze({**tiny_config(), "workers": cores})
    assert parallel.workers(one) == cores
    with pytest.raises(ConfigError, match=rf"workers={cores + more}: .* {cores} cores.*at most"):
        parallel.workers(dataclasses.replace(one, workers=cores + more))


# Arms themselves.


@pytest.mark.slow
def test_records_are_those_of_one_process(tiny_config, tmp_path):
    changed = tiny_config()
    changed["seeds"] = (0, 1)
    # Not Adam, whose first steps are of one size however small the gradient: rounding tells.
    changed["optimizer"] = {"name": "sgd", "scale_rule": "sgd"}
    one, heard = config.freeze(changed), Heard()
    expected = experiment.run(one, tmp_path / "one")
    two = dataclasses.replace(one, workers=2)
    found = experiment.run(two, tmp_path / "two", progress=heard, in_processes=True)
    assert heard.total == 12
    assert sorted(heard.done_) == sorted((name, seed) for name in ORDER for seed in (0, 1))
    same_but_for_rounding.check(found, expected)
    # And what there is, neither of them does again.
    heard = Heard()
    assert experiment.run(one, tmp_path / "two", progress=heard) == found
    assert not heard.others
