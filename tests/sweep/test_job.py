"""Jobs as processes: their log, their end, and that none is left behind."""

import os
import signal
import subprocess
import sys
import time

from kdq.sweep.job import execute, problem


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that was killed and that nobody has waited for is a zombie.
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def said(job):
    return job.log.read_text() if job.log.is_file() else ""


def test_output_and_errors_of_every_attempt_are_in_the_log(python):
    job = python("a", "import sys; print('out'); sys.exit('err')")
    assert [execute(job), execute(job)] == [1, 1]
    assert sorted(said(job).split()) == ["err", "err", "out", "out"]


def test_a_job_has_the_environment_that_it_is_given(python):
    job = python("a", "import os; print(os.environ.get('ONE'), os.environ.get('HOME'))")
    assert execute(job, environment={"ONE": "1"}) == 0
    assert said(job).split() == ["1", "None"]


def test_ignored_signals_do_not_end_a_job(python):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('lives')"
    assert execute(python("a", code)) == -signal.SIGTERM
    job = python("b", code)
    assert execute(job, ignored=(signal.SIGTERM,)) == 0
    assert said(job) == "lives\n"


def test_a_job_dies_with_the_process_that_runs_it(python):
    job = python("a", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    code = f"""
from pathlib import Path, PosixPath
from kdq.schema import Resources
from kdq.sweep.job import Job, execute
execute({job!r})
"""
    with subprocess.Popen([sys.executable, "-c", code]) as worker:
        run = int(wait_for(lambda: said(job)))
        worker.kill()
    wait_for(lambda: not is_running(run))


def test_an_exit_status_in_words():
    assert [problem(s) for s in (0, 3, -9)] == ["", "exit status 3", "killed by SIGKILL"]
