"""The executor of this machine, and how executors are found."""

import multiprocessing
import sys
import time

import pytest
from test_job import is_running, wait_for

from kdq import sweep
from kdq.config import ConfigError
from kdq.sweep import local

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
# Starts a process of its own, says its number, and waits.
NESTED = """
import subprocess, sys
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(inner.pid, flush=True)
inner.wait()
"""


def test_jobs_end_each_with_its_own_problem(python):
    jobs = [python("good", ""), python("bad", "import sys; sys.exit(3)"), python("fine", "")]
    ended = {job.name: problem for job, problem in local.make(workers=2)(jobs)}
    assert ended == {"good": "", "bad": "exit status 3", "fine": ""}


@pytest.mark.parametrize(("workers", "most"), [(None, 1), (2, 2)])
def test_so_many_run_at_a_time(python, workers, most):
    code = "import time; print(time.time()); time.sleep(0.4); print(time.time())"
    jobs = [python(f"job{i}", code) for i in range(4)]
    assert len(list(local.make(workers=workers)(jobs))) == 4
    spans = [tuple(map(float, job.log.read_text().split())) for job in jobs]
    at_once = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(at_once) == most


def test_closing_stops_what_runs_and_drops_what_waits(python):
    jobs = [python("quick", ""), *(python(f"slow{i}", SLEEP) for i in range(3))]
    ends = local.make(workers=2)(jobs)
    assert next(ends)[0].name == "quick"
    started = time.monotonic()
    ends.close()
    assert time.monotonic() - started < 20
    assert not jobs[3].log.exists()


def test_closing_kills_what_a_job_started_too(python):
    nested = python("nested", NESTED)
    wait = f"import os, time\nwhile not os.path.exists({str(nested.log)!r}) or not os.path.getsize("
    wait += f"{str(nested.log)!r}):\n    time.sleep(0.05)"
    ends = local.make(workers=2)([nested, python("quick", wait)])
    assert next(ends)[0].name == "quick"
    inner = int(nested.log.read_text())
    assert is_running(inner)
    ends.close()
    wait_for(lambda: not is_running(inner))


def test_a_process_of_the_pool_that_is_killed_leaves_no_job(python):
    job = python("orphan", "import os, time; print(os.getppid(), flush=True); time.sleep(600)")
    wait = f"import os, signal, time\nwhile not os.path.exists({str(job.log)!r}) or not os.path."
    wait += f"getsize({str(job.log)!r}):\n    time.sleep(0.05)\n"
    wait += f"os.kill(int(open({str(job.log)!r}).read()), signal.SIGKILL)\ntime.sleep(600)"
    with pytest.raises(ChildProcessError, match=r"was killed.*the same command again goes on"):
        list(local.make(workers=2)([job, python("killer", wait)]))
    assert not multiprocessing.active_children()


def test_no_workers_is_an_error():
    with pytest.raises(ConfigError, match="--workers=0: expected at least 1"):
        sweep.executor("local", workers=0)


def test_an_unknown_executor_is_an_error():
    with pytest.raises(ConfigError, match=r"unknown executor 'rey'.*valid: local, ray, slurm"):
        sweep.executor("rey")


@pytest.mark.parametrize(("name", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_executor_that_is_not_installed_names_its_extra(monkeypatch, name, module):
    monkeypatch.delitem(sys.modules, f"kdq.sweep.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs {module}.*pip install -e '\.\[{name}\]'"):
        sweep.executor(name)
