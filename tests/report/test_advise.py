"""The advisor, on records whose answer is obvious and on the project's own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from kdq import config as kdq_config
from kdq.fields import ConfigError
from kdq.report.advise import advise
from kdq.report.advisor import rules
from kdq.report.advisor.constraints import Constraints
from kdq.report.advisor.findings import findings
from kdq.report.advisor.study import studies
from kdq.report.workdirs import read_evidence

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
DATA = {"train": "a" * 9, "validation": "b" * 9, "test": "c" * 9}


def record(arm, kind, bits="fp32", *, accuracy=0.9, validation=None, seed=0, kib=4.0, **more):
    return {
        "arm": arm, "seed": seed, "kind": kind, "bits": bits, "status": "ok", "data": DATA,
        "params": 1000, "accuracy": accuracy, "validation_nll": 0.1, "size_bytes": kib * 1024,
        "validation_accuracy": accuracy if validation is None else validation,
        "train_seconds": 60.0, "steps": 10, "reference": None, "config_digest": "d1",
        "commit": "c1", "device": "cpu", **more,
    }  # fmt: skip


def over_seeds(arm, kind, bits="fp32", *, accuracies, **more):
    return [
        record(arm, kind, bits, accuracy=accuracy, seed=seed, **more)
        for seed, accuracy in enumerate(accuracies)
    ]


def read(tmp_path, records, name="runs"):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(records))
    return read_evidence([], [str(path)])


def report(tmp_path, records, **given):
    return advise(read(tmp_path, records), Constraints(**given)).markdown()


@pytest.fixture
def ladder():
    """A network that loses nothing to the teacher if taught, and nothing to W8A8; W4A4 costs."""
    small = {"params": 100, "train_seconds": 0.0, "steps": 0}
    return [
        *over_seeds("teacher", "teacher", accuracies=(0.97, 0.98, 0.96), kib=400.0),
        *over_seeds("student", "labels", accuracies=(0.91, 0.93, 0.90), kib=16.0, params=100),
        *over_seeds("kd", "KD", accuracies=(0.97, 0.979, 0.96), kib=16.0, params=100,
                    reference="student"),
        *over_seeds("ptq_w8", "PTQ", "W8A8", accuracies=(0.909, 0.931, 0.899), kib=5.0,
                    reference="student", **small),
        *over_seeds("kd_w8", "PTQ", "W8A8", accuracies=(0.97, 0.978, 0.96), kib=5.0,
                    reference="kd", **small),
        *over_seeds("kd_w4", "PTQ", "W4A4", accuracies=(0.80, 0.82, 0.79), kib=3.0,
                    reference="kd", **small),
        *over_seeds("qat_w4", "QAT", "W4A4", accuracies=(0.90, 0.92, 0.89), kib=3.0, params=100,
                    reference="student"),
        *over_seeds("qad_w4", "QAD", "W4A4", accuracies=(0.96, 0.979, 0.951), kib=3.0, params=100,
                    reference="qat_w4"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "method", "arm"),
    [
        ({}, "labels only", "teacher"),
        ({"max_size_kib": 20.0}, "KD", "kd"),
        ({"max_size_kib": 20.0, "teacher": False}, "labels only", "student"),
        ({"max_size_kib": 6.0}, "KD then PTQ", "kd_w8"),
        ({"max_size_kib": 6.0, "teacher": False}, "PTQ", "ptq_w8"),
        ({"max_size_kib": 4.0}, "QAD", "qad_w4"),
        ({"max_size_kib": 4.0, "teacher": False}, "QAT", "qat_w4"),
        ({"max_size_kib": 6.0, "integers": "none"}, None, None),
    ],
)
def test_the_method_that_the_constraints_leave(tmp_path, ladder, given, method, arm):
    text = report(tmp_path, ladder, **given)
    answer = re.search(r"### Answer\n\n\*\*(.*)\*\*", text)[1]
    if method is None:
        assert answer == "Nothing that was measured satisfies the constraints."
    else:
        assert answer.startswith(f"Use {method}: {rules.METHODS[method].says}. {arm} (")


def test_training_time_is_without_compiling_and_old_records_are_said_to_have_it(tmp_path):
    teacher = record("teacher", "teacher", accuracy=0.97, kib=400.0)
    student = record("student", "labels", accuracy=0.9, train_seconds=30.0, compile_seconds=600.0)
    quick = record("qat", "QAT", "W4A4", accuracy=0.91, reference="student", train_seconds=20.0)
    apart = [teacher, student, {**quick, "compile_seconds": 300.0}]
    text = report(tmp_path, apart, training_minutes=1.0, max_size_kib=100)
    assert "Use QAT" in text  # 50 s, and 15 minutes of compiling
    assert "Compiling is not counted." in text
    assert "contain compiling" not in text
    text = report(tmp_path, [teacher, student, quick], training_minutes=1.0, max_size_kib=100)
    assert "Train s contains it for qat" in text
    assert "runs: the training times of qat contain compiling" in text
    assert "Compiling is not counted." not in text


def test_nothing_fits_and_the_nearest_is_named(tmp_path, ladder):
    text = report(tmp_path, ladder, max_size_kib=2.5, min_accuracy=95)
    assert "**Nothing that was measured satisfies the constraints.**" in text
    assert "Relax size from 2.5 to 3 KiB, and qad_w4 (QAD, W4A4) fits: 96.33" in text
    assert "| size | 8 | size from 2.5 to 3 KiB | qad_w4 |" in text


def test_selects_on_validation_and_reports_test(tmp_path):
    records = [
        *over_seeds("honest", "QAT", "W4A4", accuracies=(0.8, 0.81, 0.79), validation=0.95),
        *over_seeds("lucky", "QAT", "W4A4", accuracies=(0.98, 0.99, 0.97), validation=0.92),
    ]
    text = report(tmp_path, records, min_accuracy=90)
    assert "**Use QAT: train the quantized network with labels. honest (W4A4" in text
    assert "On test it has 80.00 ± 1.00%: NOT what was asked. [1]" in text


def test_a_verdict_is_the_paired_t_test(tmp_path, ladder):
    sources = read(tmp_path, ladder)
    (study,) = studies(sources)
    found = {(f.rule.name, f.a.arm, f.b.arm): f for f in findings(study, sources[0])}
    taught = found["teacher in quantized training", "qad_w4", "qat_w4"]
    peer = stats.ttest_rel((96, 97.9, 95.1), (90, 92, 89)).confidence_interval(0.95)
    assert (taught.difference.low, taught.difference.high) == pytest.approx(tuple(peer))
    assert taught.verdict == "above"
    verdicts = {(name, a): f.verdict for (name, a, _), f in found.items()}
    assert verdicts == {
        ("distilled against labels", "kd"): "above",
        ("distilled against the teacher", "kd"): "level",
        ("calibrated against float", "ptq_w8"): "level",
        ("calibrated after distilling against float", "kd_w8"): "level",
        ("calibrated after distilling against float", "kd_w4"): "below",
        ("distilled before calibrating or not", "kd_w8"): "above",
        ("teacher in quantized training", "qad_w4"): "above",
        ("both at once or one after the other", "qad_w4"): "above",
    }
    text = report(tmp_path, ladder)
    said = (
        "Do both at once: with the teacher, quantized training is above that with labels (runs): "
    )
    assert f"- {said}at W4A4 +6.00 [{peer[0]:+.2f}, {peer[1]:+.2f}], qad_w4 against qat_w4" in text
    assert "In short, runs, 100 parameters: in float KD; at W8A8 KD then PTQ; at W4A4 QAD." in text


@pytest.mark.parametrize(
    ("deltas", "verdict"),
    [
        ((0.05, 0.051, 0.049), "above"),
        ((-0.05, -0.051, -0.049), "below"),
        ((0.001, -0.001, 0.0), "level"),
        ((0.05, -0.05, 0.001), "undecided"),  # contains 0, and much else
        ((0.05, 0.05), "seen"),  # too few seeds
    ],
)
def test_verdicts(tmp_path, deltas, verdict):
    records = over_seeds("qat", "QAT", "W4A4", accuracies=[0.8] * len(deltas))
    records += over_seeds("qad", "QAD", "W4A4", accuracies=[0.8 + d for d in deltas])
    # What must not be compared: other bits, another network.
    records += over_seeds("qat_w8", "QAT", "W8A8", accuracies=[0.99] * len(deltas))
    records += over_seeds("qat_big", "QAT", "W4A4", accuracies=[0.99] * len(deltas), params=5000)
    sources = read(tmp_path, records)
    (study,) = studies(sources)
    (found,) = findings(study, sources[0])
    assert (found.a.arm, found.b.arm, found.verdict) == ("qad", "qat", verdict)
    text = report(tmp_path, records)
    assert (f"- {found.rule.above} (runs)" in text) == (verdict == "above")


def test_rules_select_on_validation_and_compare_on_test(tmp_path):
    records = [
        *over_seeds("chosen", "QAT", "W4A4", accuracies=(0.8, 0.81, 0.8), validation=0.95),
        *over_seeds("lucky", "QAT", "W4A4", accuracies=(0.99, 0.99, 0.99), validation=0.9),
        *over_seeds("qad", "QAD", "W4A4", accuracies=(0.85, 0.86, 0.85), validation=0.93),
    ]
    sources = read(tmp_path, records)
    (study,) = studies(sources)
    (found,) = findings(study, sources[0])
    assert (found.a.arm, found.b.arm) == ("qad", "chosen")
    assert found.difference.mean == pytest.approx(5.0)


def test_other_data_is_kept_apart(tmp_path):
    ours = over_seeds("qat", "QAT", "W4A4", accuracies=(0.7, 0.7, 0.7))
    other = {**DATA, "test": "z" * 9}
    theirs = over_seeds("qad", "QAD", "W4A4", accuracies=(0.9, 0.9, 0.9), data=other)
    text = report(tmp_path, ours + theirs)
    assert "The records are of 2 studies" in text
    one, two = text.split("## Study ")[1:]
    assert "Use QAT" in one
    assert "Use QAD" in two
    assert "qad" not in one.partition("### What is missing")[0]
    assert "qad against qat" not in text


def _timed(device, ms):
    times = {"conditions": {"device": device}, "1": {"milliseconds": ms}}
    return {"onnx": {"size_bytes": 1000, "latency": times}}


def test_latencies_of_two_devices_are_kept_apart(tmp_path):
    records = [
        record("phone", "QAT", "W8A8", exports=_timed("phone", 5.0)),
        record("server", "QAT", "W8A8", exports=_timed("server", 0.1)),
    ]
    text = report(tmp_path, records, max_latency_ms=1.0)
    phone, server = text.split("## Study ")[1:]
    assert "Latencies are of: phone." in phone
    assert "Nothing that was measured satisfies" in phone
    assert "Latencies are of: server." in server
    assert "server (W8A8" in server


def test_what_was_not_measured_is_said_with_the_command(tmp_path, ladder):
    text = report(tmp_path, ladder, max_latency_ms=1.0, batch=64, max_energy_uj=3.0)
    assert "8 arms may: nothing rules them out, but energy, latency can't be judged" in text
    compress = "python launch/compress.py --config=CONFIG --workdir=WORKDIR"
    flags = "--config.export.formats=onnx --config.export.latency_batches=64"
    assert f"```\n{compress} {flags}\n```" in text
    assert "mixed precision: no arm does it" in text
    assert "arm(model='teacher', init='teacher', bits=\"W8A8\", reference='teacher')" in text


def test_too_few_seeds_are_said_with_the_seeds_to_run(tmp_path):
    records = [record("qat", "QAT", "W4A4", seed=4), record("qad", "QAD", "W4A4", seed=4)]
    text = report(tmp_path, records)
    assert "Fewer than 3 seeds: that it is ahead of others is no evidence. [1]" in text
    assert "Seen, but in too few seeds for a claim, teacher in quantized training" in text
    assert "--config.seeds=0,1,4\n" in text


def test_failed_records_are_named_and_not_used(tmp_path):
    failed = {**record("qat", "QAT", "W4A4", seed=7), "status": "failed", "error": "loss\nis nan"}
    for key in ("accuracy", "validation_accuracy", "size_bytes", "train_seconds", "params"):
        del failed[key]
    text = report(tmp_path, [record("qat", "QAT", "W4A4"), failed])
    assert "runs: qat, seed 7, failed and is not used: loss is nan" in text
    assert "| 1 | qat | " in text.split("## Rows")[1]
    assert " | 0 | d1 | c1 | cpu |" in text.split("## Rows")[1]  # seed 0 only
    only = report(tmp_path, [failed])
    assert "Nothing that was measured satisfies" in only
    assert "seed 7, failed" in only


def test_names_are_literal_in_markdown(tmp_path):
    text = report(tmp_path, [record("a|b<img>*c*", "QAT", "W4A4")])
    assert "a\\|b&lt;img&gt;\\*c\\*" in text
    assert not re.search(r"a\|b|<img>|[^\\]\*c", text)


def test_mixed_precision_is_compared_with_uniform_files_of_its_size(tmp_path):
    policy = {"conv": "W8A8", "head": "W2A8"}
    records = [
        *over_seeds("mixed", "PTQ", "searched", accuracies=(0.9, 0.91, 0.9), policy=policy),
        *over_seeds("w4", "PTQ", "W4A8", accuracies=(0.8, 0.81, 0.8), kib=4.2),
        *over_seeds("w8", "PTQ", "W8A8", accuracies=(0.95, 0.96, 0.95), kib=8.0),
        *over_seeds("qat", "QAT", "W4A8", accuracies=(0.97, 0.97, 0.97)),
        *over_seeds("one", "PTQ", "W4A8", accuracies=(0.7, 0.7, 0.7), policy={"a": "W4A8"}),
    ]
    records[0]["policy"] = {"conv": "W2A8", "head": "W2A8"}  # what was found at one seed of three
    sources = read(tmp_path, records)
    (study,) = studies(sources)
    methods = {c.arm: (c.method, c.widths) for c in study.candidates}
    assert methods["mixed"] == ("mixed precision", {8, 2})
    assert methods["one"] == ("PTQ", {4, 8})
    (found,) = (f for f in findings(study, sources[0]) if f.rule.b == "uniform")
    assert (found.a.arm, found.b.arm, found.verdict) == ("mixed", "w4", "above")
    assert "Mix: bits by layer are above equal bits" in report(tmp_path, records)


def _workdir(tmp_path, records, tiny_config):
    """A workdir with the config of an experiment and hand-made results."""
    model = {"model": "student", "epochs": 1.0}
    taught = {"teacher": "teacher", "distill": "kd"}
    config = {
        **tiny_config(),
        "arms": {
            "teacher": {"model": "teacher", "epochs": 1.0},
            "student": model,
            "kd": {**model, **taught},
            "unlabelled": {**model, "teacher": "teacher", "distill": "only"},
            "spoiled": {**model, "teacher": "wrong", "distill": "kd"},
            "ptq": {"model": "student", "init": "kd", "bits": "W4A4", "reference": "student"},
            "qad": {**model, **taught, "init": "student", "bits": "W4A4"},
        },
        "teachers": {"wrong": {"kind": "shuffled", "arm": "teacher"}},
    }
    config["distill"]["only"] = {**config["distill"]["kd"], "task": 0.0}
    folder = tmp_path / "run"
    for one in records:
        place = folder / one["arm"] / str(one["seed"])
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(one))
    checked = kdq_config.to_json(kdq_config.freeze(config))
    (folder / "config.json").write_text(json.dumps(checked))
    return folder


def test_a_workdir_says_what_arms_build_on(tmp_path, tiny_config):
    records = [
        record("teacher", "teacher"),
        record("student", "labels"),
        record("kd", "KD", train_seconds=30.0),
        record("unlabelled", "KD"),
        record("spoiled", "KD", accuracy=0.99),
        record("ptq", "PTQ", "W4A4", train_seconds=0.0, steps=0, reference="student"),
        record("qad", "QAD", "W4A4", train_seconds=20.0),
    ]
    folder = _workdir(tmp_path, records, tiny_config)
    sources = read_evidence([str(folder)], [])
    (study,) = studies(sources)
    found = {c.arm: c for c in study.candidates}
    assert found["ptq"].method == "KD then PTQ"  # whatever it is compared with
    seconds = {"teacher": 0, "student": 60, "kd": 30, "ptq": 30, "qad": 80}
    assert {arm: found[arm].seconds for arm in seconds} == seconds
    labels = {"kd": True, "unlabelled": False, "ptq": True, "qad": True, "teacher": False}
    assert {arm: found[arm].lineage.labels for arm in labels} == labels
    document = advise(sources, Constraints(teacher=True)).markdown()
    assert "Controls, with a spoiled teacher, are not considered: spoiled. " in document
    assert "Use labels only" in document  # the control would be 9 points ahead
    assert f"--workdir={folder} --config.data.data_dir=" in document


MEASURED = re.compile(r"\d\.\d+ ?(±|%|KiB|ms|µJ|nJ|\[|points)|[+-]\d+\.\d\d")


@pytest.mark.parametrize("given", [{"max_size_kib": 5.0, "max_drop": 1.0}, {"max_drop": 6.0}])
def test_every_sentence_with_a_measured_number_is_cited(given):
    """Of this project's own results; and each citation has its row."""
    sources = read_evidence(
        [], [str(RESULTS / f"{name}.json") for name in ("digits", "fashion_mnist")]
    )
    text = advise(sources, Constraints(**given)).markdown()
    body, rows = text.split("## Rows")
    lines = [line for line in body.splitlines() if MEASURED.search(line)]
    # What was asked, and what a tie is, are no measurements.
    lines = [line for line in lines if not re.match("Constraints:|.* Arms of one rank tie", line)]
    assert len(lines) > 40
    known = set(re.findall(r"^\| (\d+) \| .*\.json \|", rows, re.MULTILINE))
    for line in lines:
        cited = re.findall(r"\[(\d+(?:, \d+)*)\]", line)
        assert cited, line
        assert {n for group in cited for n in group.split(", ")} <= known, line


def test_the_projects_own_answer_is_what_scipy_finds():
    records = json.loads((RESULTS / "digits.json").read_text())
    of = lambda arm: [100 * r["accuracy"] for r in records if r["arm"] == arm]
    peer = stats.ttest_rel(of("qad_w4a4_kd"), of("qat_w4a4")).confidence_interval(0.95)
    mean = sum(of("qad_w4a4_kd")) / 10 - sum(of("qat_w4a4")) / 10
    text = advise(read_evidence([], [str(RESULTS / "digits.json")]), Constraints()).markdown()
    expected = (
        f"at W4A4 {mean:+.2f} [{peer.low:+.2f}, {peer.high:+.2f}], qad_w4a4_kd against qat_w4a4"
    )
    assert expected in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "is no list of records"),
        ("{", "can't be read as JSON"),
        ('[{"arm": "a", "seed": 0}]', "record 0 (a): status is missing"),
        (json.dumps([record("a", "KD"), record("a", "KD")]), "two records of arm 'a' seed 0"),
    ],
)
def test_what_is_no_records(tmp_path, content, says):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_evidence([], [str(path)])
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_places_without_records(tmp_path):
    with pytest.raises(ConfigError, match="expected --workdirs"):
        read_evidence([], [])
    with pytest.raises(ConfigError, match=r"holds no ARM/SEED/result\.json"):
        read_evidence([str(tmp_path)], [])


def test_rules_have_sources():
    methods = {*rules.METHODS, "start", "teacher", "uniform"}
    for rule in rules.RULES:
        assert rule.question in rules.QUESTIONS
        assert {rule.a, rule.b} <= methods
        assert all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in rule.papers)
        assert all((RESULTS / file).is_file() for file in rule.results)


@pytest.mark.slow
def test_launcher(tmp_path, ladder):
    (tmp_path / "runs.json").write_text(json.dumps(ladder))
    command = [sys.executable, ROOT / "launch" / "advise.py", f"--records={tmp_path}/runs.json"]
    out = tmp_path / "deep" / "advice.md"
    run = lambda *flags: subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    done = run("--max_size_kib=6", "--noteacher", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "Use PTQ: calibrate a trained network" in done.stdout
    assert "**Use PTQ: calibrate a trained network" in out.read_text()
    wrong = run("--max_size_kib=0")
    assert wrong.returncode == 1
    assert wrong.stderr == "error: --max_size_kib=0.0: expected a number above 0\n"
