"""What is said of metrics of which lower values are better, in units of their own."""

import json

import pytest
import workdirs

from kdq.report import aggregate, metric, pivot, table
from kdq.report import workdirs as reader
from kdq.report.advise import advise
from kdq.report.advisor import study
from kdq.report.advisor.constraints import Constraints
from kdq.report.page import combine, publish, tradeoff
from kdq.tasks.metric import Metric

RMSE = Metric(
    name="rmse",
    scores=("squared_error",),
    unit="mg/dl",
    higher_is_better=False,
    relative=True,
    tie=0.5,
    level=1.0,
)
PERPLEXITY = Metric(name="perplexity", scores=("nll",), higher_is_better=False, relative=True)
MAP = Metric(name="mean_average_precision", scores=("precision",), unit="%")
ERRORS = {"teacher": 50.0, "student": 60.0, "kd": 50.2, "ptq_w8a8": 61.0, "qat_w4a4": 90.0}


def records(name, values):
    """Three seeds of the arms of `workdirs`, with a metric of this name in place of accuracy."""
    found = []
    for one in workdirs.records():
        value = values.get(one["arm"], 52.0) + 0.1 * one["seed"]
        kept = {k: v for k, v in one.items() if "accuracy" not in k}
        found.append(kept | {name: value, f"{name}_last": value, f"validation_{name}": value})
    return found


@pytest.fixture
def ranked_by(monkeypatch):
    def rank(chosen):
        for module in (metric, aggregate, reader, study, combine):
            monkeypatch.setattr(module, "metric_of_records", lambda records: chosen)

    return rank


def test_lower_errors_are_better_and_differences_are_percents(ranked_by, tmp_path):
    ranked_by(RMSE)
    found = records("rmse", ERRORS)
    rows = {row.arm: row for row in table.rows(found)}
    assert rows["kd"].score.mean == pytest.approx(50.3)
    assert rows["kd"].difference.mean == pytest.approx(-16.3, abs=0.05)  # percent of the student's
    text = table.markdown(list(rows.values()), found)
    assert "| RMSE mg/dl |" in text
    assert "RMSE: on the test split, in mg/dl" in text
    assert "by the lowest RMSE there" in text
    assert "percent of RMSE above the arm named beside it" in text
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(found))
    limits = Constraints(max_size_kib=20, max_drop=1.0, min_accuracy=55)
    advice = advise(reader.read_evidence([], [str(path)]), limits).markdown()
    assert "RMSE of at most 55 mg/dl, at most 1.0 % above the teacher" in advice
    answer = advice.split("### Answer")[1].split("###")[0]
    assert "Use KD: train a smaller float network with the teacher. kd (fp32" in answer
    assert "50.30 ± 0.10 mg/dl on validation" in answer
    assert "what was asked holds there too" in answer
    assert "| labels only | teacher | fp32 | 50.10 ± 0.10 |" in advice
    assert "ruled out: accuracy, drop" in advice
    assert "Train with quantizers: QAT" not in advice
    assert "Level: the interval contains 0 and lies within ±1 %" in advice
    assert "accuracy points" not in advice


def test_the_page_shows_errors_in_their_units(ranked_by, tmp_path):
    ranked_by(RMSE)
    folder = workdirs.write(tmp_path / "run", records("rmse", ERRORS))
    text = publish.write(reader.read_workdirs([str(folder)]), tmp_path / "out").read_text()
    assert "is the smallest file within 1 % of the teacher on validation" in text
    assert "Δ: % above the arm named beside it" in text
    assert "RMSE against size on disk, KiB" in text
    assert "test RMSE, mg/dl, with 95% intervals" in text
    head = (tmp_path / "out" / "table.csv").read_text().splitlines()[0]
    assert "rmse_mg/dl,rmse_std" in head
    assert (tmp_path / "out" / "plots" / "rmse_vs_size.png").is_file()


def test_the_frontier_of_errors_is_below():
    point = {"kind": "PTQ", "bits": "W4", "start": "x", "low": None, "high": None, "tip": {}}
    points = [
        {**point, "arm": arm, "size": size, "score": score}
        for arm, size, score in (("small", 1.0, 60.0), ("best", 2.0, 50.0), ("worse", 4.0, 55.0))
    ]
    (spec,) = tradeoff.pareto(points, "size", "KiB", RMSE)
    assert [v["arm"] for v in spec["data"]["values"] if v["front"]] == ["small", "best"]
    collapsed = [*points, {**point, "arm": "lost", "size": 1.0, "score": 900.0}]
    titles = [spec["title"] for spec in tradeoff.pareto(collapsed, "size", "KiB", RMSE)]
    assert titles == ["all 4 arms", "the best 3 of 4"]


@pytest.mark.parametrize(
    ("chosen", "head", "unit"),
    [
        (PERPLEXITY, "Perplexity", "percent of perplexity"),
        (MAP, "Mean average precision %", "points"),
    ],
    ids=["perplexity", "mean average precision"],
)
def test_metrics_are_named_as_they_are(ranked_by, chosen, head, unit):
    ranked_by(chosen)
    found = records(chosen.name, dict.fromkeys(workdirs.ARMS, 0.5))
    rows = table.rows(found)
    text = table.markdown(rows, found)
    assert f"| {head} |" in text
    assert unit in text
    assert "ccuracy" not in text.replace("Accuracy with", "")
    assert pivot.markdown(rows) == ""
