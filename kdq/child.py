"""Child processes that die with the process that started them; a script, too.

    python child.py SIGNALS COMMAND...

becomes the command. A worker that is killed must leave no run behind: its retry writes to the same
folder. (Linux only; elsewhere the command runs as it is.) SIGNALS, numbers with commas between, are
ignored. It imports no package, so that it starts at once.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def die_with_parent() -> None:
    """Makes the system kill this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    for number in filter(None, sys.argv[1].split(",")):
        signal.signal(int(number), signal.SIG_IGN)  # stays so in what is executed
    os.execv(sys.argv[2], sys.argv[2:])
