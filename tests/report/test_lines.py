"""What a run says where there is no terminal: lines, at once, with the time that is left."""

import io
import re
import subprocess
import sys

import pytest

from kdq.record import ArmRecord
from kdq.report import progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def strftime(self, form):
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def told(clock):
    return Told(clock)


class Told(progress.Lines):
    """Lines, and what they have said since one last asked."""

    def __init__(self, clock):
        self.clock = clock
        super().__init__(io.StringIO())

    def said(self):
        text = self._file.getvalue()
        self._file.seek(0)
        self._file.truncate()
        return [line.removeprefix("12:00:00 ") for line in text.splitlines()]

    def wait(self, seconds):
        self.clock.now += seconds


def ok(arm, seed=0, **fields):
    metrics = {"validation": {"accuracy": 0.975}}
    return ArmRecord(**{"arm": arm, "seed": seed, "metrics": metrics} | fields)


def test_a_line_where_an_arm_begins_and_one_where_it_ends(told):
    told.start({("teacher", 0): 400, ("kd", 0): 900, ("ptq", 0): 0})
    told.prepare("teacher", 0)
    told.wait(1)
    told.arm("teacher", [0], 400)
    told.wait(49)
    told.done(ok("teacher"))
    # 500 steps, with 100 for all else of an arm, took 50 s; 1,100 are left.
    assert told.said() == [
        "3 arms and seeds to run",
        "teacher, seed 0: 400 steps",
        "[1/3] teacher, seed 0: 97.50% on validation after 50 s; about 2 min left",
    ]
    told.prepare("kd", 0)
    told.wait(3)
    error = "arm kd, seed 0: NaN or infinity\nat step 3"
    told.done(ArmRecord(arm="kd", seed=0, status="failed", error=error))
    told.prepare("ptq", 0)
    told.arm("ptq", [0], 0)  # nothing to wait for
    told.wait(2)
    told.done(ok("ptq"))
    assert told.said() == [
        "[2/3] kd, seed 0: FAILED after 3 s: NaN or infinity at step 3; about 10 s left",
        "[3/3] ptq, seed 0: 97.50% on validation after 2 s",
    ]


def test_an_arm_that_was_copied_says_from_where(told):
    told.start({("teacher", 0): 400})
    told.done(ok("teacher", shared_from="../seeds=0/teacher/0"))
    (_, line) = told.said()
    assert line == "[1/1] teacher, seed 0: 97.50% on validation, copied from ../seeds=0/teacher/0"


def test_what_compiled_is_not_expected_of_those_that_come(told):
    told.start({("a", 0): 100, ("b", 0): 100})
    told.prepare("a", 0)
    told.wait(70)
    told.done(ok("a", compile_seconds=60.0))
    assert told.said()[-1].endswith("after 70 s; about 10 s left")


def test_the_pace_of_most_counts_and_only_once_there_are_three(told):
    told.start({("arm", seed): 100 for seed in range(10)})
    for seed, seconds in enumerate((90, 2, 4)):
        told.prepare("arm", seed)
        told.wait(seconds)
        told.done(ok("arm", seed))
    assert [line.partition("after ")[2] for line in told.said()[1:]] == [
        "90 s",
        "2 s",
        "4 s; about 28 s left",  # seven of 4 s, the median
    ]


def test_what_was_done_before_is_counted_and_not_said_again(told):
    told.start({("teacher", 0): None, ("kd", 0): 100})
    told.done(ok("teacher"))
    assert told.said() == ["2 arms and seeds to run, 1 of them done before"]
    told.prepare("kd", 0)
    told.done(ok("kd"))
    assert told.said()[-1].startswith("[2/2] kd, seed 0: ")
    told.start({("teacher", 0): None})
    assert told.said() == ["1 arm and seed to run, all of them done before"]


def test_a_long_training_says_now_and_then_how_far_it_is(told):
    told.start({("kd", 0): 1000, ("kd", 1): 1000})
    told.arm("kd", [0, 1], 1000)
    told.said()
    told.wait(60)  # it compiles
    told.step(1)
    assert told.said() == ["kd, seeds 0, 1: step 1 of 1,000"]
    for step in range(2, 202):
        told.wait(0.2)
        told.step(step)
    # 200 steps took 40 s, so 20 s after 101 and 40 s after 201.
    assert told.said() == [
        "kd, seeds 0, 1: step 101 of 1,000, about 3 min left",
        "kd, seeds 0, 1: step 201 of 1,000, about 3 min left",
    ]


def test_long_calibrations_and_searches_say_so_too(told):
    told.prepare("ptq", 0)
    for _ in told.method(range(5), "adaround"):
        told.wait(15)
    assert told.said() == [
        "ptq, seed 0: adaround: 2 of 5, about 45 s left",
        "ptq, seed 0: adaround: 4 of 5, about 15 s left",
    ]
    told.search("knapsack", 0, 400)
    for count in range(1, 101):
        told.wait(0.5)
        told.evaluated(count, "kl 0.02")
    assert told.said() == [
        "search knapsack, seed 0: 400 evaluations",
        "search knapsack, seed 0: 40 of 400 evaluations, about 3 min left; best kl 0.02",
        "search knapsack, seed 0: 80 of 400 evaluations, about 3 min left; best kl 0.02",
    ]


def test_what_is_no_arm_of_an_experiment_is_said_by_itself(told):
    for _ in told.method(range(2), "timing layers"):
        told.wait(30)
    assert told.said() == ["timing layers: 1 of 2, about 30 s left", "timing layers: 2 of 2"]


def test_several_processes_speak_each_of_their_own(told):
    told.start({("a", 0): 100, ("b", 1): 100})
    first, second = told.beside(0), told.beside(1)
    assert told.beside(0) is first
    first.prepare("a", 0)
    told.wait(5)
    second.prepare("b", 1)
    first.arm("a", [0], 100)
    second.arm("b", [1], 100)
    told.wait(10)
    told.done(ok("b", 1))
    told.wait(20)
    first.step(40)
    told.done(ok("a"))
    assert told.said() == [
        "2 arms and seeds to run",
        "a, seed 0: 100 steps",
        "b, seed 1: 100 steps",
        "[1/2] b, seed 1: 97.50% on validation after 10 s; about 10 s left",
        "a, seed 0: step 40 of 100",
        "[2/2] a, seed 0: 97.50% on validation after 35 s",
    ]


PROGRAM = """
import time
from kdq.report import progress
with progress.reporter() as reporter:
    reporter.start({("kd", 0): 10})
    time.sleep(120)
"""


def test_lines_arrive_while_the_program_still_runs():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as process:
        line = process.stdout.readline().decode()
        running = process.poll() is None
        process.kill()
    assert running
    assert re.fullmatch(r"\d\d:\d\d:\d\d 1 arm and seed to run\n", line)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(3.4, "3 s"), (99, "99 s"), (125, "2 min"), (9000, "2.5 h")]
)
def test_spans(seconds, expected):
    assert progress.span(seconds) == expected


def test_a_pipe_gets_lines_on_the_standard_output(capsys):
    with progress.reporter() as reporter:
        reporter.start({("kd", 0): 10})
    captured = capsys.readouterr()
    assert captured.out.endswith(" 1 arm and seed to run\n")
    assert captured.err == ""
