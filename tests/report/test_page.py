"""What workdirs become: what is put together, what is kept apart, and the tables."""

import csv
import dataclasses
import html
import io
import json
import math
import re
import runpy
from pathlib import Path

import pytest
import workdirs

from kdq import config
from kdq.experiment import plan
from kdq.fields import ConfigError
from kdq.record import ArmRecord
from kdq.report.advisor.constraints import Constraints
from kdq.report.advisor.rules import METHODS
from kdq.report.page import combine, draw, publish, section, tables, tradeoff, views
from kdq.report.workdirs import read_evidence, read_workdirs
from kdq.tasks.classification import ACCURACY


def experiments(*folders):
    return combine.combine(read_workdirs([str(folder) for folder in folders]))


def test_seeds_of_the_same_arms_are_put_together(tmp_path):
    one = workdirs.write(tmp_path / "one", workdirs.records((0, 1)))
    two = workdirs.write(tmp_path / "two", workdirs.records((1, 2)))
    (found,) = experiments(one, two)
    assert found.name == "one + two"
    assert {row.arm: row.seeds for row in found.rows} == dict.fromkeys(workdirs.ARMS, (0, 1, 2))
    # The seed that both have counts once, and that is said.
    assert sum("is the same arm and seed" in text for text in found.problems) == len(workdirs.ARMS)


def test_arms_of_one_name_and_other_configs_are_kept_apart(tmp_path):
    one = workdirs.write(tmp_path / "one", workdirs.records((0,)))
    other = [
        {**r, "arm_digest": "other"} if r["arm"] == "kd" else r for r in workdirs.records((1,))
    ]
    found = experiments(one, workdirs.write(tmp_path / "two", other))
    assert [e.name for e in found] == ["one", "two"]
    why = "kept apart from one: its arms kd were run with another config"
    assert why in found[1].problems
    assert all(row.seeds == (0,) for row in found[0].rows)


def test_a_folder_of_two_data_sets_is_two_experiments(tmp_path):
    mixed = workdirs.records((0,))
    other = [{**r, "arm": f"{r['arm']}_b", "data": {"test": "f"}} for r in workdirs.records((0,))]
    found = experiments(workdirs.write(tmp_path / "run", [*mixed, *other]))
    assert [e.name for e in found] == ["run (1)", "run (2)"]
    assert not {row.arm for row in found[0].rows} & {row.arm for row in found[1].rows}


def latency(device, ms):
    return {"latency": {"conditions": {"device": device}, "1": {"milliseconds": ms}}}


def test_latencies_of_two_devices_are_two_columns_and_two_charts(tmp_path):
    found = workdirs.records((0, 1))
    for one in found:
        one["exports"] = {"onnx": latency(f"device {one['seed']}", 1.0 + one["seed"])}
    (experiment,) = experiments(workdirs.write(tmp_path / "run", found))
    grid = tables.results_grid(experiment)
    heads = ["Batch 1, ms (device 0)", "Batch 1, ms (device 1)"]
    assert [head for head in grid.head if head.startswith("Batch")] == heads
    first = grid.rows[0]
    assert [first[grid.head.index(h)].text for h in heads] == [
        "1.000 (n=1) onnx",
        "2.000 (n=1) onnx",
    ]
    charts = section.Section(experiment, Constraints()).charts["fronts"]
    assert [c.title for c in charts if "latency" in c.title] == [
        f"Accuracy against latency of a batch of 1, ms, on device {i}" for i in (0, 1)
    ]
    lines = list(csv.DictReader(io.StringIO(tables.csv_table([experiment]))))
    assert lines[0]["milliseconds of batch 1 on device 1"] == "2"


@pytest.mark.parametrize(
    "name",
    ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1", "  =1+1", "\n@x", "\t-x", "\uff1d1+1"],
    ids=repr,
)
def test_no_cell_of_the_csv_file_is_a_formula(tmp_path, name):
    found = workdirs.records((0,))
    for one in found:
        one["kind"] = name
    (experiment,) = experiments(workdirs.write(tmp_path / "run", found))
    lines = list(csv.DictReader(io.StringIO(tables.csv_table([experiment]), newline="")))
    expected = {f"'{name}".replace("\r", "\n")}  # a bare return would begin a row
    assert {line["kind"] for line in lines} == expected
    named = dataclasses.replace(experiment, name=name)
    lines = list(csv.DictReader(io.StringIO(tables.csv_table([named]), newline="")))
    assert {line["experiment"] for line in lines} == expected


@pytest.mark.parametrize("name", ["-0.5", "+3", "1e-3", "kd", "a=b", "W4A4", ""])
def test_numbers_and_names_of_the_csv_file_stay_as_they_are(tmp_path, name):
    found = workdirs.records((0,))
    for one in found:
        one["kind"] = name
    (experiment,) = experiments(workdirs.write(tmp_path / "run", found))
    lines = list(csv.DictReader(io.StringIO(tables.csv_table([experiment]))))
    assert {line["kind"] for line in lines} == {name}


HOSTILE = {
    "exports": {"onnx": 5},
    "policy": [1],
    "versions": "x",
    "data": {"train": {}},
    "device": ["x"],
    "bits": 7,
    "params": 10**400,
    "size_bytes": True,
}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_field_of_another_type_is_left_out_and_refused_by_advice(tmp_path, field):
    found = workdirs.records((0,))
    found[0][field] = HOSTILE[field]
    path = str(workdirs.write(tmp_path / "run", found))
    (folder,) = read_workdirs([path])
    (problem,) = [text for text in folder.problems if f"{field}=" in text]
    assert "left out" in problem
    with pytest.raises(ConfigError, match=rf"record \d+ .*{field}=.*: expected "):
        read_evidence([path], [])


def test_a_page_is_made_of_fields_of_other_types(tmp_path):
    found = workdirs.records((0, 1))
    for one, (field, value) in zip(found, HOSTILE.items(), strict=False):
        one[field] = value
    (folder,) = read_workdirs([str(workdirs.write(tmp_path / "run", found))])
    for field in HOSTILE:
        assert any(f"{field}=" in text and "left out" in text for text in folder.problems), field
    publish.write([folder], tmp_path / "out")


def test_an_integer_that_a_chart_can_not_hold_becomes_a_float():
    (record,) = workdirs.records((0,))[:1]
    for bops, kind in ((2**63 - 1, int), (2**63, float)):
        kept = ArmRecord.from_json(record | {"bops": bops}).bops
        assert (kept, type(kept)) == (bops, kind)


def test_a_config_whose_arms_are_no_objects_is_none(tmp_path):
    path = workdirs.write(tmp_path / "run", workdirs.records((0,)))
    (path / "config.json").write_text('{"arms": {"teacher": 5}}')
    assert read_workdirs([str(path)])[0].config is None
    with pytest.raises(ConfigError, match=r"config.json is no config of an experiment"):
        read_evidence([str(path)], [])


def test_curves_keep_numbers_that_a_chart_can_hold(tmp_path):
    lines = [
        '{"step": 1, "loss": 0.5, "validation_accuracy": "../x", "seconds": 1e300}',
        f'{{"step": 1{"0" * 400}, "loss": 0.5}}',
        '{"step": true, "loss": 0.5}',
        '{"step": 3, "loss": [0.5]}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert views.read_curve(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 3}]


def test_curves_that_are_devices_are_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    assert views.read_curve(tmp_path) == []


MISTAKES = {
    "nothing": ((), "expected --workdirs=RUNS"),
    "no run": (("empty",), "empty holds no ARM/SEED/result.json of a finished arm"),
    "nowhere": (("nowhere",), "nowhere holds no ARM/SEED/result.json"),
    "twice": (("run", "run"), "a folder is given twice"),
    "unreadable": (("cut",), "cut/a/0/result.json can't be read as JSON"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, mistake):
    (tmp_path / "empty").mkdir()
    workdirs.write(tmp_path / "run", workdirs.records((0,)))
    (tmp_path / "cut" / "a" / "0").mkdir(parents=True)
    (tmp_path / "cut" / "a" / "0" / "result.json").write_bytes(b"\xff{")
    names, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        read_workdirs([str(tmp_path / name) for name in names])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"confusion": [[1], [2, 3]]}', '{"confusion": [], "reliability": 3}', "{"],
)
def test_details_of_another_shape_are_named_and_not_used(tmp_path, content):
    folder = workdirs.write(tmp_path / "run", workdirs.records((0,)))
    (folder / "qad_w4a4" / "0" / "details.json").write_text(content)
    (experiment,) = experiments(folder)
    found = section.Section(experiment, Constraints())
    assert "qad_w4a4" not in found.layers
    assert "qat_w4a4" in found.layers
    assert any("qad_w4a4/0/details.json" in text for text in found.problems)


def test_the_comparison_is_of_the_arm_that_is_best_on_validation(tmp_path):
    found = workdirs.records()
    better = {"kind": "QAD", "bits": "W2A2", "size_bytes": 3000, "accuracy": 0.5}
    found += [workdirs.record("qad_w2a2", s, **better, validation_accuracy=0.99) for s in (0, 1, 2)]
    arms = {**workdirs.ARMS, "qad_w2a2": better}
    (experiment,) = experiments(workdirs.write(tmp_path / "run", found, arms=arms))
    rows = dict(section.Section(experiment, Constraints()).comparison)
    cells = {name: dict(zip(section.ABOUT, own, strict=True)) for name, own in rows.items()}
    assert cells["Arm shown"]["QAD"] == "qad_w2a2: W2A2, 1,000 parameters"
    assert cells["Accuracy kept, test"]["QAD"].startswith("50.00 ± 0.00%")
    assert cells["Size on disk"]["QAD"] == "2.9 KiB, 133.3× smaller than the teacher"
    assert cells["Energy"]["QAD"] == "200 nJ an example, modelled; not measured"
    assert cells["Latency"]["QAD"] == "not measured"
    # The student's training and its own, each with compiling apart.
    assert cells["Training cost"]["QAD"].startswith(
        "6.0 s of training, with what it starts from; 4 s of compiling; on "
    )
    assert cells["Arm shown"]["mixed precision"] == "not measured: no finished arm does it"
    assert "kl (weight 0.9, temperature 2)" in cells["Technique used here"]["KD"]
    assert "labels (weight 0.1)" in cells["Technique used here"]["KD"]
    assert section.ABOUT.keys() <= METHODS.keys()


def test_training_cost_of_old_records_says_that_it_contains_compiling(tmp_path):
    old = [{k: v for k, v in r.items() if k != "compile_seconds"} for r in workdirs.records((0,))]
    old = [{**r, "calibration_seconds": 0.25} if r["kind"] == "PTQ" else r for r in old]
    (experiment,) = experiments(workdirs.write(tmp_path / "run", old))
    costs = dict(section.Section(experiment, Constraints()).comparison)["Training cost"]
    kd, ptq = costs[:2]
    assert kd.startswith("3.0 s of training, with what it starts from; compiling included, as old")
    assert "; 0.25 s of calibration; compiling included, as old" in ptq


def test_how_far_is_the_smallest_file_near_the_teacher(tmp_path):
    (experiment,) = experiments(workdirs.write(tmp_path / "run", workdirs.records()))
    first, *others = section.Section(experiment, Constraints()).answer
    assert first.startswith("QAD, W4A4, is as far as one can go: qad_w4a4 is the smallest file")
    assert "within 1 point of the teacher on validation. 4.3 KiB" in first
    assert not any(text.startswith("Use ") for text in others)  # nothing was asked for
    limited = section.Section(experiment, Constraints(max_size_kib=5)).answer
    assert limited[0].startswith("Use ")
    assert limited[-2:] == [first, others[-1]]
    said = " ".join([first, *others, *limited])
    assert not re.search(r"\[\d+(, \d+)*\]", said)  # rows that only the whole advice lists


def test_tables_hold_the_same_numbers_and_break_nothing(tmp_path):
    odd = {"teacher": {"kind": "teacher"}, "=a|b & 100%_x": {"bits": "W4A4"}, "lost": {}}
    found = [workdirs.record(arm, **fields) for arm, fields in odd.items() if arm != "lost"]
    found.append(workdirs.failed("lost", error="it\nbroke"))
    found[1]["accuracy"] = math.nan
    out = tmp_path / "out"
    folder = workdirs.write(tmp_path / "run", found, arms=odd)
    publish.write(read_workdirs([str(folder)]), out)
    lines = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [line["arm"] for line in lines] == ["teacher", "'=a|b & 100%_x", "lost"]
    assert [line["accuracy_percent"] for line in lines] == ["90", "", ""]
    assert lines[2]["failed_seeds"] == "0"
    latex = (out / "table.tex").read_text()
    assert r"=a|b \& 100\%\_x & W4A4" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {5}
    markdown = (out / "table.md").read_text()
    assert r"=a\|b &amp; 100%" in markdown
    assert "it broke" in markdown or "failed (1 of 1 seeds): it" in markdown
    for name in ("accuracy_vs_size", "accuracy_vs_energy_modelled"):
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert "<svg" in (out / "plots" / f"{name}.svg").read_text()


def test_the_page_forbids_the_network_and_scripts_of_others(tmp_path):
    folder = workdirs.write(tmp_path / "run", workdirs.records((0,)))
    text = publish.write(read_workdirs([str(folder)]), tmp_path / "out").read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    policy = html.unescape(policy)
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert policy.split("script-src")[1].split(";")[0].count("sha256-") == 2
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_records_that_are_too_many_lose_their_matrices_and_that_is_said(tmp_path, monkeypatch):
    found = workdirs.records((0,))
    for i, one in enumerate(found):
        one["cka"] = {f"layer {j}": math.sin(i + j) for j in range(200)}
    (experiment,) = experiments(workdirs.write(tmp_path / "run", found))
    sections = [section.Section(experiment, Constraints())]
    assert publish._pack_records(sections)[1] == ()
    monkeypatch.setattr(publish, "RECORDS_BYTES", 6000)
    packed, left_out = publish._pack_records(sections)
    assert "cka" in left_out
    assert 0 < len(packed) <= 6000
    monkeypatch.setattr(publish, "RECORDS_BYTES", 10)
    assert publish._pack_records(sections) == ("", ("all of it",))


def test_a_saved_config_is_the_experiment_that_was_run(tiny_config, tmp_path):
    experiment = config.freeze(tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(config.to_json(experiment)))
    root = Path(__file__).parents[2]
    get_config = runpy.run_path(str(root / "configs" / "saved" / "workdir.py"))["get_config"]
    again = config.freeze(get_config(str(tmp_path)))
    assert again == experiment
    assert plan.digests(again) == plan.digests(experiment)
    with pytest.raises(ConfigError, match=r"there is no .*nowhere/config.json"):
        get_config(str(tmp_path / "nowhere"))


def point(arm, size, accuracy, **fields):
    base = {
        "kind": "PTQ",
        "bits": "W4A4",
        "start": "student",
        "low": None,
        "high": None,
        "tip": {"Arm": arm},
    }
    return {**base, "arm": arm, "size": size, "score": accuracy, **fields}


def test_arms_without_a_cost_or_a_number_are_not_drawn_and_collapsed_ones_get_a_panel():
    drawn_by_size = lambda points: tradeoff.pareto(points, "size", "KiB", ACCURACY)
    field = [point(f"a{i}", 10.0 + i, 95 + i / 2) for i in range(6)]
    drawn = drawn_by_size([*field, point("x", None, 90.0), point("y", 5.0, None)])
    assert [len(spec["data"]["values"]) for spec in drawn] == [6]
    assert drawn_by_size([point("x", None, 90.0)]) == []
    both = drawn_by_size([*field, point("low", 3.0, 10.0)])
    assert [spec["title"] for spec in both] == ["all 7 arms", "the best 6 of 7"]
    far = drawn_by_size([*field, point("t", 900.0, 99.0, kind="teacher")])
    assert [spec["title"] for spec in far] == ["all 7 arms", "the best 6 of 7, the teacher aside"]
    front = [v["arm"] for v in both[1]["data"]["values"] if v["front"]]
    assert front == [f"a{i}" for i in range(6)]
    png, svg = draw.pictures(both, "two")
    assert png.startswith(b"\x89PNG")
    assert b"the best 6 of 7" in svg


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("confusion", 1, 0), "../../x"),
        (("confusion", 0), [1, 2, 3]),
        (("reliability", "confidence", 0), True),
        (("attributions", "maps", 0, 0, 0), "1"),
        (("attributions", "images", 0, 0, 0), 10**400),
        (("attributions", "label"), []),
        (("layers", 0, "bytes"), {}),
        (("layers", 0, "range"), [1.0]),
        (("layers", 0, "path"), 3),
    ],
    ids=lambda value: "/".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_details_of_other_types_are_named_and_not_used(tmp_path, place, value):
    folder = workdirs.write(tmp_path / "run", workdirs.records((0,)))
    path = folder / "qad_w4a4" / "0" / "details.json"
    document = workdirs.details(4)
    assert views.read_details(path.parent)[1] == ""
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(document))
    assert "is no file of details" in views.read_details(path.parent)[1]


def test_a_run_without_a_config_or_details_says_what_is_missing(tmp_path):
    folder = workdirs.write(tmp_path / "run", workdirs.records((0,)), with_details=False)
    (folder / "config.json").unlink()
    (experiment,) = experiments(folder)
    found = section.Section(experiment, Constraints())
    assert any("config.json is not there" in text for text in found.problems)
    assert "--config=CONFIG" in found.commands["kd"]
    for part in ("layers", "calibration", "confusions", "attributions"):
        assert "run the experiment again in a new folder" in found.missing[part]
