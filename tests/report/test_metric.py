"""What is said of tasks other than classification: units, lower values that are better, order."""

import dataclasses
import json
import subprocess
import sys

import pytest
import workdirs

from kdq.fields import ConfigError
from kdq.record import ArmRecord
from kdq.report import metric, table
from kdq.report import workdirs as reader
from kdq.report.advise import advise
from kdq.report.advisor.constraints import Constraints
from kdq.report.page import combine, publish, tradeoff
from kdq.tasks import build
from kdq.tasks.metric import Metric

PERPLEXITY = Metric(name="perplexity", scores=("nll",), higher_is_better=False, relative=True)
ERRORS = {"teacher": 50.0, "student": 60.0, "kd": 50.2, "ptq_w8a8": 61.0, "qat_w4a4": 90.0}
SHARES = {"teacher": 0.95, "student": 0.90, "kd": 0.94, "ptq_w8a8": 0.89, "qat_w4a4": 0.80}


def records(task, values, fidelity, **fields):
    """Three seeds of the arms of `workdirs`, with the metrics of a task: {name: its value}."""
    made = []
    for document in workdirs.records():
        arm, seed = document["arm"], document["seed"]
        kept = ArmRecord.from_json(document).to_json()
        numbers = {name: value(arm, seed) for name, value in values.items()}
        splits = dict.fromkeys(("validation", "test", "test_last"), numbers)
        made.append(kept | {"task": task, "metrics": splits, "fidelity": fidelity} | fields)
    return made


def errors():
    return records(
        "regression",
        {
            "rmse": lambda arm, seed: ERRORS.get(arm, 52.0) + 0.1 * seed,
            "mae": lambda arm, seed: 0.8 * ERRORS.get(arm, 52.0),
            "r2": lambda arm, seed: 1 - ERRORS.get(arm, 52.0) / 100,
        },
        {"rmse_to_teacher": 12.5, "noise": 0.1},
        unit="mg/dl",
        ece=None,
    )


def labels():
    return records(
        "multilabel",
        {
            "micro_f1": lambda arm, seed: SHARES.get(arm, 0.85) + 0.001 * seed,
            "nll": lambda arm, seed: 0.3,
            "macro_f1": lambda arm, seed: SHARES.get(arm, 0.85) - 0.05,
            "mean_average_precision": lambda arm, seed: SHARES.get(arm, 0.85) - 0.1,
        },
        {"agreement": 0.95, "kl_to_teacher": 0.1, "noise": 0.1},
    )


def write(path, made):
    path.write_text(json.dumps(made))
    return str(path)


def test_lower_errors_are_better_and_differences_are_percents(tmp_path):
    made = errors()
    rows = {row.arm: row for row in table.rows(made)}
    assert rows["kd"].score.mean == pytest.approx(50.3)
    assert rows["kd"].difference.mean == pytest.approx(-16.3, abs=0.05)  # percent of the student's
    text = table.markdown(list(rows.values()), made)
    assert "| RMSE mg/dl |" in text
    assert "| MAE mg/dl | R2 | RMSE to teacher mg/dl |" in text
    assert "| 40.160 ± 0.000 | 0.498 ± 0.000 | 12.500 ± 0.000 |" in text
    assert "RMSE: on the test split, in mg/dl" in text
    assert "by the lowest RMSE there and, between equals, the lowest MAE" in text
    assert "percent of RMSE above the arm named beside it" in text
    for word in ("ccuracy", "class", "Agreement", "KL"):
        assert word not in text
    limits = Constraints(max_size_kib=20, max_drop=1.0, min_accuracy=55)
    advice = advise(reader.read_evidence([], [write(tmp_path / "runs.json", made)]), limits)
    text = advice.markdown()
    assert "RMSE of at most 55 mg/dl, at most 1.0 % above the teacher" in text
    answer = text.split("### Answer")[1].split("###")[0]
    assert "Use KD: train a smaller float network with the teacher. kd (fp32" in answer
    assert "50.300 ± 0.100 mg/dl on validation" in answer
    assert "what was asked holds there too" in answer
    assert "| labels only | teacher | fp32 | 50.100 ± 0.100 |" in text
    assert "ruled out: accuracy, drop" in text
    assert "Train with quantizers: QAT" not in text
    assert "Level: the interval contains 0 and lies within ±1 %" in text
    assert "accuracy points" not in text


def test_a_limit_beyond_100_is_one_of_errors_but_of_no_share(tmp_path):
    evidence = reader.read_evidence([], [write(tmp_path / "errors.json", errors())])
    assert "at most 500 mg/dl" in advise(evidence, Constraints(min_accuracy=500)).markdown()
    evidence = reader.read_evidence([], [write(tmp_path / "labels.json", labels())])
    with pytest.raises(ConfigError, match=r"--min_accuracy=101.*expected 0 to 100"):
        advise(evidence, Constraints(min_accuracy=101))


def test_the_page_shows_errors_in_their_units(tmp_path):
    folder = workdirs.write(tmp_path / "run", errors(), with_details=False)
    text = publish.write(reader.read_workdirs([str(folder)]), tmp_path / "out").read_text()
    assert "is the smallest file within 1 % of the teacher on validation" in text
    assert "Δ: % above the arm named beside it" in text
    assert "RMSE against size on disk, KiB" in text
    assert "test RMSE, mg/dl, lower is better, with 95% intervals" in text
    head = (tmp_path / "out" / "table.csv").read_text().splitlines()[0].split(",")
    assert {"rmse_mg/dl", "rmse_std", "mae_mg/dl", "r2", "rmse_to_teacher_mg/dl"} <= set(head)
    assert not {"agreement_percent", "kl_to_teacher_nats"} & set(head)
    plots = tmp_path / "out" / "plots"
    assert (plots / "rmse_vs_size.png").is_file()
    assert (plots / "rmse_to_teacher_vs_rmse.png").is_file()
    for part in ("calibration", "attributions", "confusions"):  # of classification alone
        assert f'id="{part}-0"' not in text
        assert f'href="#{part}-0"' not in text
    assert 'id="layers-0"' in text


def test_labels_are_shown_by_f1_in_points(tmp_path):
    made = labels()
    rows = {row.arm: row for row in table.rows(made)}
    text = table.markdown(list(rows.values()), made)
    assert "| Micro F1 % |" in text
    assert "| Macro F1 % | Mean average precision % | Agreement % | KL |" in text
    assert "by the highest micro F1 there and, between equals, the lowest negative log-lik" in text
    assert "micro F1 points above the arm named beside it" in text
    assert "Agreement: share of test predictions" in text
    limits = Constraints(max_size_kib=20, max_drop=1.5)
    advice = advise(reader.read_evidence([], [write(tmp_path / "runs.json", made)]), limits)
    assert "at most 1.5 points below the teacher" in advice.markdown()
    assert "94.10 ± 0.10% on validation, -1.00" in advice.markdown()
    folder = workdirs.write(tmp_path / "run", made, with_details=False)
    page = publish.write(reader.read_workdirs([str(folder)]), tmp_path / "out").read_text()
    assert "Micro F1 against size on disk, KiB" in page
    assert "Agreement with the teacher against micro F1" in page
    assert 'id="confusions-0"' not in page
    assert "ccuracy" not in page.split("<main")[1].split("</main>")[0].replace("Accuracy, ", "")


def test_records_of_several_tasks_are_never_in_one_table(tmp_path):
    both = [*errors(), *({**r, "arm": f"{r['arm']}_labels"} for r in labels())]
    with pytest.raises(ConfigError, match=r"of one task, got regression in mg/dl, multilabel"):
        table.rows(both)
    with pytest.raises(ConfigError, match="of one task"):
        table.markdown(table.rows(errors()), both)
    text = advise(reader.read_evidence([], [write(tmp_path / "b.json", both)]), Constraints())
    assert "2 studies" in text.markdown()
    folder = workdirs.write(tmp_path / "run", both, with_details=False)
    experiments = combine.combine(reader.read_workdirs([str(folder)]))
    assert [each.metric.name for each in experiments] == ["rmse", "micro_f1"]


def test_a_task_of_a_newer_version_is_left_out_and_named(tmp_path):
    made = errors()
    made[0] |= {"task": "detection"}
    (workdir,) = reader.read_workdirs([str(workdirs.write(tmp_path / "run", made))])
    assert len(workdir.runs) == len(made) - 1
    assert any("unknown" in why and "detection" in why for why in workdir.problems)


def test_the_frontier_of_errors_is_below():
    rmse = build("regression", unit="mg/dl").primary
    point = {"kind": "PTQ", "bits": "W4", "start": "x", "low": None, "high": None, "tip": {}}
    points = [
        {**point, "arm": arm, "size": size, "score": score}
        for arm, size, score in (("small", 1.0, 60.0), ("best", 2.0, 50.0), ("worse", 4.0, 55.0))
    ]
    (spec,) = tradeoff.pareto(points, "size", "KiB", rmse)
    assert [v["arm"] for v in spec["data"]["values"] if v["front"]] == ["small", "best"]
    collapsed = [*points, {**point, "arm": "lost", "size": 1.0, "score": 900.0}]
    titles = [spec["title"] for spec in tradeoff.pareto(collapsed, "size", "KiB", rmse)]
    assert titles == ["all 4 arms", "the best 3 of 4"]


def test_a_metric_that_no_task_has_yet_is_named_as_it_is(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Perplexing:
        name = "perplexing"
        metrics = (PERPLEXITY, Metric(name="nll", scores=("nll",), higher_is_better=False))
        fidelity = ()
        primary = PERPLEXITY

    monkeypatch.setattr(metric, "task_of_records", lambda records: Perplexing())
    made = records("classification", {"perplexity": lambda arm, seed: 0.5}, {})
    rows = table.rows(made)
    text = table.markdown(rows, made)
    assert "| Perplexity |" in text
    assert "percent of perplexity" in text
    assert "ccuracy" not in text
    assert table.markdown_by_width(rows) == ""


def test_the_advisor_needs_no_jax_before_there_are_records():
    code = (
        "import sys, kdq.report.advise, kdq.report.workdirs; "
        "assert not {'jax', 'flax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
