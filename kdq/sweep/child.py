"""Becomes a command that dies with the process that started it; a script, which imports no package.

    python child.py SIGNALS COMMAND...

A worker that is killed must leave no run behind: its retry writes to the same folder. (Linux only;
elsewhere the command runs as it is.) SIGNALS, numbers with commas between, are ignored.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in filter(None, sys.argv[1].split(",")):
        signal.signal(int(number), signal.SIG_IGN)  # stays so in what is executed
    os.execv(sys.argv[2], sys.argv[2:])
