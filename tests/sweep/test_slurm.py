"""Runs as jobs of Slurm: the script that sbatch would get, and submitit's own executors."""

import os
import re
import shlex
import signal
import threading
import time

import pytest

pytest.importorskip("submitit")

from kdq import sweep
from kdq.config import ConfigError

# Stand-ins for Slurm's programs: sbatch keeps the script and starts the array's tasks one by one.
PROGRAMS = {
    "sbatch": """
cp "$1" "$FAKE_SLURM/script_$$.sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
(
    [ -n "$last" ] && export SLURM_ARRAY_JOB_ID=$$
    for task in $(seq 0 ${last:-0}); do
        [ -n "$last" ] && export SLURM_ARRAY_TASK_ID=$task
        SLURM_JOB_ID=$$ bash "$1"
    done
) > "$FAKE_SLURM/$$.log" 2>&1 &
echo "Submitted batch job $$"
""",
    "srun": """
while [ "${1#--}" != "$1" ]; do
    case $1 in --output|--error) shift;; esac
    shift
done
"$@"
""",
    "sacct": "echo 'JobID|State|NodeList'",
    "scancel": 'echo "$@" >> "$FAKE_SLURM/cancelled"',
}


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr("kdq.sweep.slurm.SECONDS", 0.2)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with the scripts that sbatch was given."""
    programs, folder = tmp_path / "bin", tmp_path / "fake"
    programs.mkdir()
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def parameters(script):
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE)
    return {name: shlex.split(value)[0] if value else True for name, value in lines}


def test_resources_and_limits_are_in_the_script(cluster, tmp_path, python):
    stated = {"cpus": 4, "gpus": 1, "memory_gib": 1.5, "minutes": 90}
    jobs = [python(f"big{i}", "", **stated) for i in range(3)]
    jobs += [python(f"small{i}", "", minutes=5) for i in range(2)]
    run = sweep.executor(
        "slurm",
        folder=tmp_path / "slurm",
        workers=2,
        parameters={"partition": "gpu", "exclusive": True},
    )
    ends = run(jobs)
    assert next(ends)[1] == ""
    ends.close()
    big, small = sorted(
        map(parameters, cluster.glob("script_*.sh")), key=lambda found: -int(found["time"])
    )
    assert big["cpus-per-task"] == "4"
    assert big["gpus-per-node"] == "1"
    assert big["mem"] == "1536MB"
    assert big["time"] == "90"
    assert big["array"] == "0-2%2"
    assert small["array"] == "0-1%2"
    assert small["time"] == "5"
    assert not {"cpus-per-task", "gpus-per-node", "mem"} & set(small)
    for script in (big, small):
        assert script["partition"] == "gpu"
        assert script["exclusive"] is True
        assert script["signal"].startswith("USR2@")  # before the end: time to queue again
    # Closed on the way: what had not ended is cancelled.
    assert (cluster / "cancelled").read_text().count("\n") == 4


def test_jobs_run_and_fail_each_for_itself(cluster, tmp_path, python):
    jobs = [
        python("good", "print('ran')", minutes=1),
        python("bad", "import sys; sys.exit(3)", minutes=1),
    ]
    ends = sweep.executor("slurm", folder=tmp_path / "slurm")(jobs)
    assert {job.name: problem for job, problem in ends} == {"good": "", "bad": "exit status 3"}
    assert jobs[0].log.read_text() == "ran\n"
    assert not (cluster / "cancelled").exists()


def test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on(tmp_path, python):
    # What Slurm does to a job's processes before the time is up, by submitit's local executor.
    code = """
import os, pathlib, time
seen = pathlib.Path("seen")
print("attempt", flush=True)
if not seen.exists():
    seen.write_text(str(os.getppid()))
    time.sleep(600)
"""
    job = python("job", code, minutes=1)
    ends = sweep.executor("slurm", folder=tmp_path / "slurm", cluster="local")([job])

    def interrupt():
        while not (tmp_path / "seen").is_file() or not (tmp_path / "seen").read_text():
            time.sleep(0.05)
        os.kill(int((tmp_path / "seen").read_text()), signal.SIGUSR2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert [problem for _, problem in ends] == [""]
    thread.join()
    assert job.log.read_text() == "attempt\nattempt\n"


@pytest.mark.slow
def test_closing_stops_local_jobs(tmp_path, python):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    jobs = [python("quick", "", minutes=1), python("slow", code, minutes=1)]
    ends = sweep.executor("slurm", folder=tmp_path / "slurm", cluster="local")(jobs)
    assert next(ends)[0].name == "quick"
    while not jobs[1].log.is_file() or not jobs[1].log.read_text():
        time.sleep(0.05)
    ends.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(jobs[1].log.read_text()), 0)


# submitit leaves its two log files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_debug_executor_runs_jobs_here(tmp_path, python):
    jobs = [python("good", "print('ran')", minutes=1), python("bad", "1 / 0", minutes=1)]
    ends = sweep.executor("slurm", folder=tmp_path / "slurm", cluster="debug")(jobs)
    assert [problem for _, problem in ends] == ["", "exit status 1"]
    assert jobs[0].log.read_text() == "ran\n"


def test_time_has_to_be_stated(tmp_path, python):
    run = sweep.executor("slurm", folder=tmp_path / "slurm", cluster="debug")
    with pytest.raises(ConfigError, match=r"run a: config\.resources\.minutes=0 is unstated"):
        next(run([python("a", "")]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "slrm"}, "unknown --cluster 'slrm' .*valid: slurm, local, debug"),
        ({"workers": 0}, "--workers=0: expected at least 1"),
        ({}, '--executor=slurm: Could not detect "srun"'),
    ],
)
def test_what_can_not_be_is_an_error(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=message):
        sweep.executor("slurm", folder=tmp_path, **options)
