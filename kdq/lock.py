"""One program at a time writes a workdir.

Whoever writes holds `WORKDIR/lock` by `flock`, which the system releases when the process ends,
however it ends. The file says who holds it, and is gone when nobody does. Processes that a program
starts to work for it write in its name.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import logging
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TextIO, TypeVar

from kdq import processes
from kdq.fields import ConfigError
from kdq.files import named_errors

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

FILE = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of the file system
_LONGEST = 200  # characters of a command that are shown

_holds: dict[str, list[int]] = {}  # of this process: a folder's thread, once for each hold
_guard = threading.Lock()


class HeldError(ConfigError):
    """Another program writes in a workdir; the message says which."""


@contextlib.contextmanager
def hold(workdir: str | os.PathLike[str], *, alone: bool = False) -> Iterator[None]:
    """Keeps other programs from writing a workdir; the thread that holds it may hold it again.

    Of several processes of one run the first holds it, for all. A file system without locks is
    named in a warning, and nothing keeps programs apart there.

    Args:
      workdir: made if need be; if nothing is left in it, a folder that was made here goes again.
      alone: this process holds it by itself, whatever others there are.

    Raises:
      HeldError: another program, or another thread of this one, holds it.
      OSError: the folder can't be made or written.
    """
    name, thread = os.path.realpath(workdir), threading.get_ident()
    with _guard:
        holds = _holds.setdefault(name, [])
        if holds and holds[0] != thread:
            raise HeldError(f"{workdir} is in use by another thread of this program")
        holds.append(thread)
    folder = Path(name)
    is_new, files = not folder.exists(), []
    try:
        if len(holds) == 1:
            acquire = lambda: files.append(_acquire(folder, str(workdir)))
            acquire() if alone else processes.first(acquire)
        yield
    finally:
        for file in filter(None, files):
            with contextlib.suppress(OSError):  # the folder is gone
                os.unlink(file.name)
            file.close()
        if files and is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        with _guard:
            holds.pop()
            if not holds:
                del _holds[name]


def hold_workdir(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function hold its keyword argument `workdir` while it runs."""

    @functools.wraps(function)
    def holding(*args: P.args, **kwargs: P.kwargs) -> T:
        with hold(kwargs["workdir"]) if "workdir" in kwargs else contextlib.nullcontext():
            return function(*args, **kwargs)

    return holding


def _acquire(folder: Path, workdir: str) -> TextIO | None:
    """Returns the locked file; None where the file system has no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / FILE, "a+", encoding="utf-8")  # noqa: SIM115 closed by its holder
        except FileNotFoundError:
            continue  # the folder was new, empty, and went with its holder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have deleted the file between the opening and the lock.
            try:
                is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / FILE))
            except FileNotFoundError:
                is_there = False
            if not is_there:
                file.close()
                continue
            now = datetime.datetime.now().astimezone()
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": now.isoformat(sep=" ", timespec="seconds"),
                "command": shlex.join(sys.orig_argv),
            }
            with named_errors(folder / FILE):
                file.truncate(0)
                file.write(json.dumps(holder) + "\n")
                file.flush()
            return file
        except BlockingIOError:
            with file:
                raise HeldError(f"{workdir} is in use by {_describe(file)}") from None
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            log.warning(
                "%s is on a file system without locks (%s): nothing keeps a second program from "
                "writing there, so start none",
                workdir,
                error.strerror,
            )
            os.unlink(folder / FILE)
            return None


def _describe(file: TextIO) -> str:
    """Returns who holds a lock, and what to do, in a line."""
    todo = "wait until it ends, stop it, or choose another folder"
    try:
        file.seek(0)
        who = json.loads(file.read())
        command = " ".join(str(who["command"]).split())
        if len(command) > _LONGEST:
            command = f"{command[:_LONGEST]}..."
        text = f"process {who['pid']} of {who['host']} since {who['since']}: {command}"
    except (ValueError, KeyError, TypeError):
        return f"another program: {todo}"  # which has not written its name yet
    return f"{text} ({todo})"
