"""Which runs are done, and what the table makes of all of them."""

import dataclasses
import json
from pathlib import Path

import pytest

from kdq.config import ConfigError
from kdq.experiment import plan
from kdq.experiment.sharing import Shared
from kdq.experiment.store import Store
from kdq.record import ArmRecord
from kdq.sweep import results, runs

ROOT = Path(__file__).parents[2]


def planned(config, workdir, *sweep, **options):
    return runs.plan_runs(config, sweep, workdir, launch=ROOT / "launch", **options)


def record(run, arm, seed, accuracy):
    return {
        "arm": arm,
        "seed": seed,
        "status": "ok",
        "kind": "teacher" if arm == "teacher" else "labels",
        "bits": "fp32",
        "reference": None,
        "arm_digest": plan.digests(run.experiment)[arm],
        "config_digest": run.digest,
        "accuracy": accuracy,
        "size_bytes": 2048 if arm == "teacher" else 1024,
    }


def pretend(run, accuracy, arms=("teacher", "student")):
    """Leaves what the run would leave."""
    made = [record(run, arm, seed, accuracy) for arm in arms for seed in run.experiment.seeds]
    for one in made:
        folder = run.folder / one["arm"] / str(one["seed"])
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(one))
    (run.folder / "results.json").write_text(json.dumps(made))


def table_rows(workdir):
    lines = [line for line in (workdir / "table.md").read_text().splitlines() if "|" in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_runs_that_differ_in_seeds_are_one_experiment(config, tmp_path, capsys):
    found = planned(config, tmp_path, *({"seeds": (s,)} for s in (0, 1)))
    for run, accuracy in zip(found, (0.5, 0.7), strict=True):
        pretend(run, accuracy)
    results.write(found, {}, tmp_path)
    rows = table_rows(tmp_path)
    assert [row[0] for row in rows] == ["teacher", "student"]
    assert all("60.00 ± 14.14" in row for row in rows)
    assert "60.00 ± 14.14" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert [(r["run"], r["arm"], r["metrics"]["test"]["accuracy"]) for r in written] == [
        ("base,seeds=0", "teacher", 0.5),
        ("base,seeds=0", "student", 0.5),
        ("base,seeds=1", "teacher", 0.7),
        ("base,seeds=1", "student", 0.7),
    ]
    assert written[2]["overrides"] == {"seeds": [1]}


def test_other_runs_have_rows_of_their_own_and_sizes_against_their_teacher(config, tmp_path):
    sweep = [{"evaluations": n, "seeds": (s,)} for n in (2, 3) for s in (0, 1)]
    found = planned(config, tmp_path, *sweep)
    for run in found:
        pretend(run, run.experiment.evaluations / 10)
    results.write(found, {}, tmp_path)
    rows = {row[0]: row for row in table_rows(tmp_path)}
    assert list(rows) == [f"evaluations={n}/{a}" for n in (2, 3) for a in ("teacher", "student")]
    assert "30.00 ± 0.00" in rows["evaluations=3/student"]
    assert "2.0×" in rows["evaluations=3/student"]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 8


def test_what_failed_is_said_below_the_table(config, tmp_path, capsys):
    found = planned(config, tmp_path, {"evaluations": 2}, {"evaluations": 3})
    pretend(found[0], 0.5, arms=("teacher",))
    results.write(found, {"evaluations=3": "exit status 1"}, tmp_path)
    assert [row[0] for row in table_rows(tmp_path)] == ["evaluations=2/teacher"]
    text = (tmp_path / "table.md").read_text()
    assert "Run evaluations=3 failed: exit status 1." in text


def test_nothing_finished_is_no_table(config, tmp_path, capsys):
    found = planned(config, tmp_path, {})
    results.write(found, {"base": "exit status 1"}, tmp_path)
    assert "No arm of any run is finished." in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_a_run_is_finished_when_all_it_makes_is_there(config, tmp_path):
    (run,) = planned(config, tmp_path, {"seeds": (0, 1)})
    assert not results.is_finished(run)
    pretend(run, 0.5)
    assert results.is_finished(run)
    report = run.folder / "results.json"
    report.write_text(json.dumps(json.loads(report.read_text())[:-1]))
    assert not results.is_finished(run)  # its own table is of another day
    (exporting,) = planned(
        config, tmp_path, {"seeds": (0, 1)}, shared={"export.formats": ("onnx",)}
    )
    assert not results.is_finished(exporting)
    (only,) = planned(config, tmp_path, {"seeds": (0, 1)}, arm="teacher")
    assert results.is_finished(only)  # launch/train.py writes no report
    (run.folder / "teacher" / "1" / "result.json").unlink()
    assert not results.is_finished(only)


def test_arms_of_runs_that_were_there_before_are_offered(config, tmp_path, capsys):
    first, second = planned(config, tmp_path, *({"evaluations": n} for n in (2, 3)))
    third, fourth = planned(config, tmp_path, *({"arms.student.epochs": n} for n in (0.5, 0.7)))
    for run in (first, third):
        pretend(run, 0.5)
    results.offer_arms([first, second, third, fourth], tmp_path)

    def once(run, arm):
        shared = Shared(tmp_path / "shared", run.experiment, Store(run.experiment, run.folder))
        identity = ArmRecord.from_json(record(run, arm, 0, 0.5))
        return shared.once(identity, lambda: dataclasses.replace(identity, status="failed"))

    # Another teacher is another arm, and another student of the same teacher.
    assert [once(second, arm).status for arm in ("teacher", "student")] == ["failed", "failed"]
    assert once(fourth, "teacher").shared_from == f"../{third.name}/teacher/0"
    assert once(fourth, "student").status == "failed"
    results.write([third, fourth], {}, tmp_path)
    said = "trained in one of them and copied by the others: teacher (1 of 2)."
    assert said in (tmp_path / "table.md").read_text()
    assert said in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "results.json").read_text())[2]["shared_from"]


def test_results_of_another_config_are_an_error(config, tmp_path):
    (run,) = planned(config, tmp_path, {})
    pretend(run, 0.5)
    (other,) = planned(config, tmp_path, {}, shared={"arms.student.epochs": 9.0})
    with pytest.raises(ConfigError, match="was made with another config"):
        results.is_finished(other)
