"""Running programs, watched from outside."""

import os
import subprocess
import time


def children(pid):
    """Every process below one, by its id: what `ps` says of it."""
    # Whole lines: without -ww they end at COLUMNS, which CI sets, in the middle of a command.
    command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    found, below = {}, {pid}
    while below:
        new = {int(own): said for own, parent, said in rows if int(parent) in below}
        below = set(new) - set(found)
        found |= new
    return found


def wait_for(condition, process, seconds=120.0, every=0.05):
    """What `condition` gives once that is true, while `process` runs."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < end, "waited too long"
        time.sleep(every)
    return found


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
