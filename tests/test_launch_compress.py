"""The entry points as a user runs them: processes, their output, their exit status, their files.

Most runs use configs/digits.py:quick with fewer arms; the whole of it runs with `-m slow`.
"""

import json
import re
import runpy
import shutil
import signal
import subprocess
import time
from pathlib import Path

import digits_run
import numpy as np
import pytest
import safetensors.numpy
from programs import children, is_there, launcher, refusal, run, wait_for

from kdq import files

slow = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ARMS = digits_run.ARMS


@pytest.fixture(scope="module")
def narrowed(digits_folder):
    return digits_folder / digits_run.CONFIG


@pytest.fixture(scope="module")
def launch(data_dir):
    return launcher(data_dir)


@pytest.fixture
def program(data_dir, monkeypatch, capsys):
    """Runs a script of launch/ in this process; returns the line of its mistake and its output."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))

    def start(script, *arguments):
        capsys.readouterr()
        return run(script, *arguments), capsys.readouterr().out

    return start


def compress_flags(narrowed, workdir):
    return digits_run.flags(narrowed, workdir)


@pytest.fixture(scope="module")
def unbroken(digits_folder):
    """The process and the folder that it left."""
    said = [(digits_folder / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess("compress", 0, *said), digits_folder / digits_run.WORKDIR


def comparable(records):
    """Without what may differ between two runs: the time, and the commit of the source tree."""
    varying = dict.fromkeys(("train_seconds", "calibration_seconds", "compile_seconds", "commit"))
    return [record | varying for record in records]


def places(folder):
    """What a run or a report says last."""
    page, *tables = (folder / f for f in ("report.html", "table.md", "table.csv", "table.tex"))
    return f"Report: {page}; tables: {', '.join(map(str, tables))}\n"


def table_of(output):
    """Without what was said as the run went, which has its times."""
    return output[output.index(" Arm ") :]


def packed_bytes(workdir):
    return {arm: (workdir / arm / "0" / "model.safetensors").read_bytes() for arm in ARMS}


def test_a_run_leaves_results_tables_and_plots(unbroken):
    process, workdir = unbroken
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    records = files.read_json(workdir / "results.json")
    assert [r["arm"] for r in records] == list(ARMS)
    assert {r["status"] for r in records} == {"ok"}
    for record in records:
        arm = workdir / record["arm"] / "0"
        assert files.read_json(arm / "result.json") == record
        assert (arm / "model.safetensors").stat().st_size == record["size_bytes"]
        assert (arm / "metrics.jsonl").exists() == bool(record["steps"])
    markdown = (workdir / "table.md").read_text()
    plot = (workdir / "plots" / "accuracy_vs_size.png").read_bytes()
    assert plot.startswith(b"\x89PNG\r\n\x1a\n")
    # It has said so as it went, and says where to look at the end.
    for i, record in enumerate(records, 1):
        line = rf"^\d\d:\d\d:\d\d \[{i}/6\] {record['arm']}, seed 0: "
        line += rf"{100 * record['metrics']['validation']['accuracy']:.2f}% on validation after "
        assert re.search(line, process.stdout, re.MULTILINE), process.stdout
    assert process.stdout.endswith(places(workdir))
    assert (
        (workdir / "table.md").read_text().startswith("**A quick run: these numbers mean nothing")
    )
    assert "A quick run: these numbers mean nothing" in process.stdout
    # The printed table has a line an arm, with the accuracy of its record.
    for text, separator in ((process.stdout, None), (markdown, "|")):
        rows = {}
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.split(separator) if cell.strip()]
            if cells and cells[0] in ARMS:
                rows[cells[0]] = line
        assert list(rows) == list(ARMS)
        for record in records:
            assert f"{100 * record['metrics']['test']['accuracy']:.2f}" in rows[record["arm"]]


def test_the_page_of_a_run_shows_what_was_measured(unbroken, visit):
    _, workdir = unbroken
    assert (workdir / "report.html").stat().st_size < 3_000_000
    page = visit(workdir / "report.html")
    for record in files.read_json(workdir / "results.json"):
        row = page.locator(
            "#results-table-0 tbody tr", has=page.get_by_text(record["arm"], exact=True)
        )
        assert f"{100 * record['metrics']['test']['accuracy']:.2f}" in row.first.inner_text()
    drawn = page.locator(".chart").evaluate_all("all => all.map(one => one.id.split('-')[2])")
    parts = {"fronts", "layers", "training", "fidelity", "calibration", "confusions"}
    assert parts <= set(drawn)
    assert page.locator(".chart svg.marks").count() == len(drawn)
    maps = page.locator(".maps tr").count()
    assert maps == 7  # the images, teacher, student, and the best of KD, PTQ, QAT and QAD
    assert page.locator(".missing").count() == 0


@slow
def test_report_combines_folders_and_its_commands_run(unbroken, program, tmp_path):
    _, workdir = unbroken
    answer = program("report", f"--workdirs={workdir}", f"--out={tmp_path / 'out'}")
    assert answer == (None, places(tmp_path / "out"))
    saved = f"--config=configs/saved/workdir.py:{workdir}"
    flags = (saved, f"--workdir={tmp_path / 'again'}", "--arm=kd", "--seed=0")
    assert program("train", *flags)[0] is None
    file = Path("kd", "0", "model.safetensors")
    assert (tmp_path / "again" / file).read_bytes() == (workdir / file).read_bytes()
    assert refusal("report", f"--workdirs={tmp_path}", f"--out={tmp_path / 'none'}") == (
        f"error: --workdirs: {tmp_path} holds no ARM/SEED/result.json of a finished arm"
    )
    assert not (tmp_path / "none").exists()


@slow
def test_the_same_command_again_trains_nothing(unbroken, program, narrowed):
    first, workdir = unbroken
    models = {arm: (workdir / arm / "0" / "model.safetensors").stat().st_mtime_ns for arm in ARMS}
    started = time.monotonic()
    mistake, output = program("compress", *compress_flags(narrowed, workdir))
    assert mistake is None
    assert table_of(output) == table_of(first.stdout)
    assert "6 arms and seeds to run, all of them done before" in output
    for arm, changed in models.items():
        assert (workdir / arm / "0" / "model.safetensors").stat().st_mtime_ns == changed
    assert time.monotonic() - started < 120


@slow
def test_a_killed_run_that_is_started_again_gives_the_same(
    unbroken, launch, program, narrowed, tmp_path
):
    _, expected = unbroken
    checkpoints = tmp_path / "kd" / "0" / "checkpoints"
    command = compress_flags(narrowed, tmp_path)
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with launch.start("compress", *command, **options) as process:
        try:
            saved = lambda: any(p.name.isdigit() for p in checkpoints.glob("*"))
            wait_for(saved, process, seconds=550, every=0.002)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "kd" / "0" / "result.json").exists()
    assert (tmp_path / "student" / "0" / "result.json").exists()

    assert program("compress", *command)[0] is None
    results = [files.read_json(w / "results.json") for w in (tmp_path, expected)]
    assert comparable(results[0]) == comparable(results[1])
    assert packed_bytes(tmp_path) == packed_bytes(expected)
    for arm in ("teacher", "kd", "qad_w4a4_kd"):
        curves = [(w / arm / "0" / "metrics.jsonl").read_text() for w in (tmp_path, expected)]
        assert curves[0] == curves[1]


def in_two_processes(narrowed, workdir):
    config, _, *overrides = compress_flags(narrowed, workdir)
    return f"{config},seeds=2", f"--workdir={workdir}", "--config.workers=2", *overrides


@pytest.fixture(scope="module")
def unbroken_in_two(launch, narrowed, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    process = launch("compress", *in_two_processes(narrowed, workdir))
    assert process.returncode == 0, process.stderr
    return files.read_json(workdir / "results.json")


@slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_in_two_processes_that_is_stopped_leaves_none_and_goes_on(
    unbroken_in_two, launch, narrowed, tmp_path, how
):
    command = in_two_processes(narrowed, tmp_path)
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with launch.start("compress", *command, **options) as process:
        try:
            saved = lambda: any(p.name.isdigit() for p in tmp_path.glob("kd/*/checkpoints/*"))
            wait_for(saved, process, seconds=550, every=0.002)
            started = children(process.pid)
        finally:
            process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "interrupted: the same command again goes on from here\n"
    else:
        assert process.returncode == -signal.SIGKILL
        assert "Traceback" not in errors
    assert len(started) >= 2
    give_up = time.monotonic() + 30
    while any(map(is_there, started)):
        assert time.monotonic() < give_up, "a process is left"
        time.sleep(0.1)
    assert 0 < len(list(tmp_path.rglob("result.json"))) < 2 * len(ARMS)

    again = launch("compress", *command)
    assert again.returncode == 0, again.stderr
    results = files.read_json(tmp_path / "results.json")
    assert len(results) == 2 * len(ARMS)
    assert comparable(results) == comparable(unbroken_in_two)


@slow
def test_train_runs_one_arm_and_what_it_needs(unbroken, program, narrowed, tmp_path):
    command = (*compress_flags(narrowed, tmp_path), "--arm=ptq_w4a4_student_mse", "--seed=0")
    mistake, output = program("train", *command)
    assert mistake is None
    assert "ptq_w4a4_student_mse" in output
    arms = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert arms == ["ptq_w4a4_student_mse", "student", "teacher"]
    for arm in arms:  # the same files as launch/compress.py makes
        file = Path(arm, "0", "model.safetensors")
        assert (tmp_path / file).read_bytes() == (unbroken[1] / file).read_bytes()


@pytest.mark.slow
def test_export_writes_files_and_says_what_they_do(unbroken, program, tmp_path):
    _, workdir = unbroken
    arguments = (f"--workdir={workdir}", "--arm=qat_w4a4", f"--out={tmp_path / 'out'}")
    mistake, output = program("export", *arguments, "--format=packed,stablehlo")
    assert mistake is None
    record = json.loads((workdir / "qat_w4a4" / "0" / "result.json").read_text())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"packed", "stablehlo"}
    lines = [line.split() for line in output.splitlines()]
    accuracies = {cells[1]: cells[4] for cells in lines if cells and cells[0] == "0"}
    # What the record says was measured on the same weights, by the simulation.
    assert accuracies == dict.fromkeys(
        manifest["files"], f"{100 * record['metrics']['test']['accuracy']:.2f}"
    )


@pytest.mark.slow
def test_a_format_that_fails_is_a_line_and_a_status_when_all_others_are_written(
    unbroken, program, tmp_path
):
    pytest.importorskip("jax2onnx")
    arguments = (f"--workdir={unbroken[1]}", "--arm=qat_w4a4", f"--out={tmp_path / 'out'}")
    mistake, output = program("export", *arguments, "--format=onnx_int8,packed")
    assert mistake.startswith("error: onnx_int8, seed 0: format 'onnx_int8': it has integers")
    assert "\n" not in mistake
    assert (tmp_path / "out" / "model.safetensors").is_file()
    rows = [line.split() for line in output.splitlines()]
    assert {row[1] for row in rows if row and row[0] == "0"} == {"onnx_int8", "packed"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"packed"}
    assert mistake.endswith(manifest["failed"]["onnx_int8"])


EXPORT_MISTAKES = {
    "arm": (["--arm=qat_w4a"], "error: unknown arm 'qat_w4a' (did you mean 'qat_w4a4'?); valid: "),
    "format": (["--arm=kd", "--format=onyx"], "error: format: unknown export format 'onyx' (did"),
    "seed": (["--arm=kd", "--seed=7"], "has the seeds [0] of arm 'kd', wanted [7]"),
    "workdir": (["--arm=kd", "--workdir=nowhere"], "error: nowhere holds no experiment: no "),
    "out": (["--arm=kd", "--format=packed", "--out=/dev/null/x"], "'/dev/null/x'"),
}


@slow
@pytest.mark.parametrize("mistake", EXPORT_MISTAKES)
def test_a_mistake_of_an_export_is_answered_in_one_line(unbroken, mistake):
    arguments, message = EXPORT_MISTAKES[mistake]
    answer = refusal("export", f"--workdir={unbroken[1]}", *arguments)
    assert message in answer
    assert "\n" not in answer


@slow
def test_a_damaged_file_is_not_exported(unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[1], workdir)
    path = workdir / "kd" / "0" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    answer = refusal("export", f"--workdir={workdir}", "--arm=kd", "--format=packed")
    assert answer.startswith(f"error: {path} is no packed model: ")
    assert "\n" not in answer
    assert not (path.parent / "export").exists()


@slow
def test_another_config_in_the_same_folder_is_refused(unbroken, narrowed, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    _, workdir = unbroken
    before = packed_bytes(workdir)
    answer = refusal(
        "compress", *compress_flags(narrowed, workdir), "--config.distill.kd.terms.kl.temperature=9"
    )
    assert "\n" not in answer
    assert f"{workdir / 'kd' / '0'}" in answer
    assert "another config" in answer
    assert packed_bytes(workdir) == before


@slow
def test_an_arm_that_diverges_is_a_row_and_no_crash(launch, narrowed, tmp_path):
    process = launch(
        "compress", *compress_flags(narrowed, tmp_path), "--config.arms.kd.learning_rate=1e36"
    )
    assert process.returncode == 0, process.stderr
    records = {r["arm"]: r for r in files.read_json(tmp_path / "results.json")}
    failed = {arm for arm, r in records.items() if r["status"] == "failed"}
    assert failed == {"kd", "qad_w4a4_kd"}
    row = next(line for line in process.stdout.splitlines() if line.split()[:1] == ["kd"])
    assert "failed" in row
    assert "arm kd, seed 0 failed: NaN or infinity" in process.stderr
    assert "Traceback" not in process.stderr


@slow
def test_the_quick_config_as_shipped(program, tmp_path):
    mistake, output = program(
        "compress", "--config=configs/digits.py:quick", f"--workdir={tmp_path}"
    )
    assert mistake is None
    records = files.read_json(tmp_path / "results.json")
    loaded = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]("quick")
    assert [r["arm"] for r in records] == list(loaded.arms)
    assert {r["status"] for r in records} == {"ok"}
    printed = {line.split()[0] for line in output.splitlines() if line.split()}
    assert set(loaded.arms) <= printed
    sizes = {r["arm"]: r["size_bytes"] for r in records}
    names = [f"ptq_w{b}a{b}_student_mse" for b in (2, 3, 4, 8)]
    assert sorted(names, key=sizes.get) == names
    file = tmp_path / "qat_w2a2" / "0" / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    assert arrays["params/conv_1/kernel"].dtype == np.uint8
