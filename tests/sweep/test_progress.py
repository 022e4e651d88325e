"""What a sweep says while it runs."""

import io

from rich.console import Console

from kdq.sweep import run


def shown(jobs, *, terminal, ended=()):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None)
    with run.reporter(jobs, 2, console) as end:
        for job in jobs[:2]:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.touch()
        for name, problem in ended:
            end(name, problem)
    return file.getvalue()


def test_a_line_a_run_where_there_is_no_terminal(python):
    jobs = [python(name, "") for name in "abc"]
    text = shown(jobs, terminal=False, ended=[("b", ""), ("a", "exit status 3")])
    assert text == "[3/5] b: done\n[4/5] a: failed: exit status 3\n"


def test_a_bar_with_what_runs_and_what_failed(python):
    jobs = [python(name, "") for name in "abc"]
    text = shown(jobs, terminal=True, ended=[("a", "exit status 3")])
    assert "[3/5] a: failed: exit status 3" in text
    assert "3/5 done, 1 running, 1 failed" in text
