"""Bars of a run on a terminal; elsewhere there are lines, see test_lines."""

import io

from rich.console import Console

from kdq.record import ArmRecord
from kdq.report import progress

STEPS = {(name, seed): 10 for name in ("teacher", "student", "kd") for seed in (0, 1)}


def shown(tell):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    with progress.reporter(console) as reporter:
        tell(reporter)
    return file.getvalue()


def last(text):
    """The bars as they are left on the screen."""
    return [line.strip() for line in text.split("\n") if "left" in line][-2:]


def test_a_bar_for_all_and_one_for_the_arm():
    def tell(reporter):
        reporter.start(STEPS)
        reporter.done(ArmRecord(arm="teacher", seed=0))
        reporter.arm("kd", [0, 1], 10)
        reporter.step(7)

    text = shown(tell)
    assert "arms" in text
    assert "1/6" in text
    assert "kd, seeds 0, 1" in text
    assert "7/10" in text


def test_a_bar_for_each_of_several_processes():
    def tell(reporter):
        reporter.start(STEPS)
        reporter.beside(0).arm("student", [0], 10)
        reporter.beside(1).arm("kd", [1], 20)
        reporter.beside(0).step(3)
        reporter.beside(1).step(17)
        reporter.beside(0).arm("ptq", [0], 0)  # takes no steps: no bar

    bars = last(shown(tell))
    assert any("arms" in bar and "0/6" in bar for bar in bars)
    assert any("kd, seed 1" in bar and "17/20" in bar for bar in bars)
    assert not any("ptq" in bar for bar in bars)
    assert not any("student" in bar for bar in bars)


def test_a_bar_for_each_stage_of_a_calibration():
    def tell(reporter):
        reporter.start(STEPS)
        reporter.prepare("ptq", 0)
        for layer in reporter.method(["conv_0", "conv_1", "head"], "adaround"):
            if layer == "head":
                break

    assert any("adaround" in bar and "2/3" in bar for bar in last(shown(tell)))
