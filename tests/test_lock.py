"""One program at a time in a workdir."""

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from kdq import lock
from kdq.fields import ConfigError

# Holds a folder until it is killed; imports nothing large.
HOLD = """
import sys, time
from kdq import lock
with lock.hold(sys.argv[1], alone=True):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another program that holds a folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "work"), "and\nmore"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_program_is_told_who_holds_it_until_that_is_killed(other, tmp_path):
    with pytest.raises(ConfigError) as raised, lock.hold(tmp_path / "work"):
        pass
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'work'} is in use by process {other.pid} of ")
    assert os.uname().nodename in message
    assert " since 20" in message
    assert "from kdq import lock" in message  # its command
    assert "wait until it ends, stop it, or choose another folder" in message
    assert len(message.splitlines()) == 1
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert os.listdir(tmp_path / "work") == ["lock"]  # of no account
    with lock.hold(tmp_path / "work"):
        held = json.loads((tmp_path / "work" / "lock").read_text())
        assert held["pid"] == os.getpid()
        (tmp_path / "work" / "result").touch()
    assert os.listdir(tmp_path / "work") == ["result"]


def test_it_says_so_where_the_file_does_not_say_who(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(lock.HeldError, match="is in use by another program: wait"):
            lock.hold(tmp_path).__enter__()


def test_a_thread_may_hold_again_what_it_holds_and_no_other_may(tmp_path):
    errors = []

    def enter():
        try:
            with lock.hold(tmp_path):
                pass
        except ConfigError as error:
            errors.append(str(error))

    with lock.hold(tmp_path), lock.hold(str(tmp_path) + "/."):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert errors == [f"{tmp_path} is in use by another thread of this program"]
    enter()
    assert len(errors) == 1


def test_a_folder_that_is_new_and_stays_empty_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "a") == []


def test_a_file_system_without_locks_is_named_and_written(tmp_path, monkeypatch, caplog):
    def fail(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with caplog.at_level(logging.WARNING, logger="kdq"), lock.hold(tmp_path):
        assert os.listdir(tmp_path) == []
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{tmp_path} is on a file system without locks (No locks available)")


def test_a_function_holds_its_workdir(tmp_path):
    @lock.hold_workdir
    def work(value, *, workdir):
        with pytest.raises(BlockingIOError), open(workdir / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return value

    assert work(3, workdir=tmp_path) == 3
    with pytest.raises(TypeError, match="workdir"):
        work(3)
