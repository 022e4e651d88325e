"""launch/sweep.py as a user runs it: real runs of tiny networks, by each executor."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from programs import children, is_there, refusal, wait_for

slow = pytest.mark.slow
ROOT = Path(__file__).parents[1]

CONFIG = f"""
import runpy

def get_config(arg=None):
    config = runpy.run_path({str(ROOT / "configs" / "digits.py")!r})["get_config"](arg)
    for name in list(config.arms):
        if name not in ("teacher", "student"):
            del config.arms[name]
    config.arms.teacher.epochs = 0.2
    config.arms.student.epochs = 0.5
    config.models.teacher.widths = (4, 4)
    config.models.student.widths = (4, 4)
    config.evaluations = 1
    config.checkpoint_seconds = 0.0
    return config
"""
SWEEP = """
def get_sweep(arg="2"):
    for rate in (1e-2, 2e-3):
        for seed in range(int(arg)):
            yield {"arms.student.learning_rate": rate, "seeds": (seed,), "resources.minutes": 5}
"""
BROKEN = """
def get_sweep():
    yield {"name": "good"}
    yield {"name": "bad", "data.name": "digit", "evaluations": 2}  # only a run finds out
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, text in {"config": CONFIG, "sweep": SWEEP, "broken": BROKEN}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def launch(data_dir, files):
    """Starts the sweep of a file of `files`."""
    environment = os.environ | {"TFDS_DATA_DIR": str(data_dir)}

    def start(sweep, workdir, *arguments, variables=(), **options):
        command = [sys.executable, "launch/sweep.py", f"--config={files / 'config.py'}:quick"]
        command += [f"--workdir={workdir}", f"--sweep={files / sweep}", *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(command, cwd=ROOT, env=environment | dict(variables), **options)

    def run(*arguments):
        with start(*arguments) as process:
            output, errors = process.communicate(timeout=550)
        return subprocess.CompletedProcess("sweep", process.returncode, output, errors)

    run.start = start
    return run


def numbers(workdir):
    """What each run, arm and seed measured; each may be there once."""
    records = json.loads((workdir / "results.json").read_text())
    keys = ("metrics", "size_bytes")
    found = {(r["run"], r["arm"], r["seed"]): [r[key] for key in keys] for r in records}
    assert len(found) == len(records)
    return found


def changed(workdir):
    return {p: p.stat().st_mtime_ns for p in workdir.glob("runs/*/*/*/model.safetensors")}


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_others_go_on(launch, files, tmp_path):
    process = launch("broken.py", tmp_path, "--workers=2")
    assert process.returncode == 1
    assert "good: done" in process.stderr
    assert "bad: failed: exit status 1" in process.stderr
    assert "error: no data set 'digit' in TFDS or in " in process.stderr  # the end of its log
    assert [run for run, _, _ in numbers(tmp_path)] == ["good", "good"]
    assert "good/student" in process.stdout
    assert "Run bad failed: exit status 1." in (tmp_path / "table.md").read_text()

    # Mended, the same command runs what is not done, and only that.
    before, log = changed(tmp_path), (tmp_path / "runs" / "good" / "log.txt").read_bytes()
    assert len(before) == 2
    (files / "mended.py").write_text(BROKEN.replace('"digit"', '"digits"'))
    process = launch("mended.py", tmp_path, "--arm=teacher")
    assert process.returncode == 0, process.stderr
    assert "[2/2] bad: done" in process.stderr
    assert "good: done" not in process.stderr
    assert [(run, arm) for run, arm, _ in numbers(tmp_path)] == [
        ("good", "teacher"),
        ("bad", "teacher"),
    ]
    assert before.items() <= changed(tmp_path).items()
    assert (tmp_path / "runs" / "good" / "log.txt").read_bytes() == log


def test_nothing_is_started_if_one_run_is_wrong(files, data_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    answer = refusal(
        *("sweep", f"--config={files / 'config.py'}:quick", f"--workdir={tmp_path / 'run'}"),
        *(f"--sweep={files / 'sweep.py'}", "--config.arms.student.label_smoothing=2.0"),
    )
    assert answer.startswith("error: run learning_rate=0.01,seeds=0: config.arms.student.")
    assert "\n" not in answer
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_slurm_runs_the_same_runs(launch, tmp_path):
    pytest.importorskip("submitit")
    process = launch("sweep.py:1", tmp_path, "--executor=slurm", "--cluster=debug", "--arm=teacher")
    assert process.returncode == 0, process.stderr
    names = ["learning_rate=0.01,seeds=0", "learning_rate=0.002,seeds=0"]
    assert [run for run, _, _ in numbers(tmp_path)] == names


def runs_of(pid):
    return {child: said for child, said in children(pid).items() if "launch/compress.py" in said}


@slow
@pytest.mark.parametrize(
    ("executor", "number"),
    [("local", signal.SIGINT), ("local", signal.SIGTERM), ("ray", signal.SIGINT)],
)
def test_a_stopped_sweep_leaves_no_process_and_goes_on(launch, tmp_path, executor, number):
    pytest.importorskip("ray")
    arguments = ("sweep.py:1", tmp_path, f"--executor={executor}", "--workers=2")
    with launch.start(*arguments) as process:
        wait_for(lambda: len(runs_of(process.pid)) == 2, process)
        below = children(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("interrupted: the same command again goes on from here\n")
    left = lambda: [said for pid, said in below.items() if is_there(pid)]
    assert not [said for said in left() if "resource_tracker" not in said]
    for _ in range(40):  # multiprocessing's own, which ends once it sees that the sweep has
        if left():
            time.sleep(0.05)
    assert not left()
    again = launch(*arguments)
    assert again.returncode == 0, again.stderr
    assert len(numbers(tmp_path)) == 4


@pytest.fixture(scope="module")
def one_by_one(launch, tmp_path_factory):
    """What twelve runs give when nothing happens."""
    workdir = tmp_path_factory.mktemp("sweep")
    process = launch("sweep.py:6", workdir, "--arm=student")
    assert process.returncode == 0, process.stderr
    assert "copied by the others: teacher (6 of 12)." in process.stdout
    return numbers(workdir)


@slow
def test_shared_arms_are_those_that_a_run_trains_by_itself(one_by_one, files, data_dir, tmp_path):
    """Twelve runs have twelve teachers of six seeds; one run of the second rate, without others."""
    run = "learning_rate=0.002,seeds=3"
    command = [sys.executable, "launch/train.py", f"--config={files / 'config.py'}:quick"]
    command += ["--config.arms.student.learning_rate=0.002", "--config.seeds=(3,)"]
    command += ["--config.workers=1", f"--workdir={tmp_path}", "--arm=student"]
    environment = os.environ | {"TFDS_DATA_DIR": str(data_dir)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    for arm in ("teacher", "student"):
        record = json.loads((tmp_path / arm / "3" / "result.json").read_text())
        assert "shared_from" not in record
        alone = [record[key] for key in ("metrics", "size_bytes")]
        assert one_by_one[run, arm, 3] == alone


@slow
def test_twelve_runs_on_ray_with_a_worker_killed(launch, one_by_one, tmp_path):
    pytest.importorskip("ray")
    before = {folder: set(os.listdir(folder)) for folder in (Path.home(), "/tmp")}
    arguments = ("--executor=ray", "--workers=2", "--arm=student")
    with launch.start("sweep.py:6", tmp_path, *arguments) as process:
        wait_for(lambda: list(tmp_path.glob("runs/*/student/0/result.json")), process)

        def run_and_worker():
            below = children(process.pid)
            runs = [pid for pid, said in below.items() if "launch/train.py" in said]
            return runs and (runs[0], parent_of(runs[0]))

        run, worker = wait_for(run_and_worker, process)
        assert children(process.pid)[worker].startswith("ray::")
        os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=550)
    assert process.returncode == 0, errors
    assert numbers(tmp_path) == one_by_one
    records = json.loads((tmp_path / "results.json").read_text())
    copied = [(r["arm"], r["seed"]) for r in records if "shared_from" in r]
    assert sorted(copied) == [("teacher", seed) for seed in range(6)]
    assert len({name for name, _, _ in one_by_one}) == 12
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| learning")]
    assert [row.split("|")[-2].strip() for row in rows] == ["6"] * 4  # seeds
    assert not is_there(run)
    for folder, names in before.items():  # of Ray's own
        new = set(os.listdir(folder)) - names
        assert not [name for name in new if "ray" in name]


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@slow
def test_on_a_cluster_that_is_there(launch, tmp_path):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_MODE": "token"}
    environment = {**os.environ, **token, "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="ray-test-", ignore_cleanup_errors=True) as folder:
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
            *(f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2"),
            *("--include-dashboard=false", f"--object-store-memory={100 * 2**20}"),
        ]
        cluster = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: answers(port), cluster)
            arguments = ("--executor=ray", f"--address=127.0.0.1:{port}", "--arm=student")
            with launch.start("sweep.py:1", tmp_path, *arguments, variables=token) as process:
                _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            assert len(numbers(tmp_path)) == 4  # two runs of a teacher and a student
            assert answers(port)  # it is not ours to end
        finally:
            cluster.terminate()
            cluster.wait(timeout=60)


def answers(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False
