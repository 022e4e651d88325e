"""What is drawn: intervals filled or hollow, the arms of the front, one style."""

import matplotlib
import pytest
from matplotlib.figure import Figure

from kdq.evaluate.statistics import PairedInterval
from kdq.report import figures
from kdq.report.aggregate import rows


@pytest.fixture
def axes():
    return Figure().subplots()


def interval(mean, half, n=5):
    return PairedInterval(mean=mean, low=mean - half, high=mean + half, n=n)


def test_an_interval_without_0_is_filled_and_one_of_a_single_seed_has_no_whisker(axes):
    single = interval(3.0, float("nan"), n=1)
    found = {"sure": interval(1.0, 0.5), "unsure": interval(0.2, 0.5), "single": single}
    figures.draw_intervals(axes, found, color="#123456")
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(d.get_xdata()[0], d.get_ydata()[0]) for d in dots] == [(1.0, 0), (0.2, 1), (3.0, 2)]
    assert [d.get_markerfacecolor() for d in dots] == ["#123456", "white", "white"]
    whiskers = [line for line in axes.lines if line.get_color() == "#123456" and line not in dots]
    assert [list(line.get_xdata()) for line in whiskers] == [[0.5, 1.5], [-0.3, 0.7]]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(found)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top


def test_the_front_has_the_arms_that_no_cheaper_one_beats(axes):
    records = [
        {
            "arm": arm,
            "seed": seed,
            "status": "ok",
            "kind": kind,
            "bits": "",
            "accuracy": accuracy + seed / 100,
            "size_bytes": size,
        }
        for arm, kind, accuracy, size in (
            ("teacher", "teacher", 0.90, 1000),
            ("worse", "PTQ", 0.80, 100),
            ("better", "QAT", 0.85, 100),
            ("smallest", "mine", 0.70, 50),
            ("beaten", "PTQ", 0.60, 200),
        )
        for seed in (0, 1)
    ]
    front = figures.draw_front(axes, rows(records), lambda row: row.size_bytes)
    assert [row.arm for row in front] == ["smallest", "better", "teacher"]
    names = axes.get_legend_handles_labels()[1]
    assert sorted(names) == ["PTQ", "QAT", "mine", "teacher"]
    assert axes.get_xscale() == "log"


def test_the_style_is_of_all_figures_that_follow():
    with matplotlib.rc_context():
        figures.use_style()
        axes = Figure().subplots()
        assert not axes.spines["top"].get_visible()
        assert axes.plot([0, 1])[0].get_color() == figures.SPARE_COLORS[0]
