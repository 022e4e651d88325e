"""Training curves as JSON lines: one object an entry, never a duplicate after a resume.

With a folder for them, the same as TensorBoard's events.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from kdq import files, processes
from kdq.fields import ConfigError

log = logging.getLogger(__name__)


def tensorboard() -> ModuleType:
    """The package that writes events. Raises ConfigError if it is not installed."""
    try:
        import tensorboardX  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "--tensorboard: tensorboardX is not installed: pip install 'kdq[tensorboard]'"
        ) from error
    return tensorboardX


class MetricsWriter:
    """Appends `{"step": ..., name: value}` lines to a file.

    Args:
      path: the file; its folder must exist.
      after_step: entries of a run that was cut off past this step are dropped, since the resumed
        run writes them again.
      events: folder for the same entries as TensorBoard's events, which is made anew; None: none.

    Of several processes the first writes, and the others do nothing.
    """

    def __init__(
        self, path: str | os.PathLike[str], after_step: int = 0, events: Path | None = None
    ):
        self._file = self._events = None
        if not processes.is_first():
            return
        self._path = Path(path)
        entries = self._entries() if after_step else []
        kept = [entry for entry in entries if entry["step"] <= after_step]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        files.write_atomic(self._path, text.encode())
        self._file = self._path.open("a", encoding="utf-8")
        if events is not None:
            shutil.rmtree(events, ignore_errors=True)  # a file of events can't be cut
            self._events = tensorboard().SummaryWriter(str(events))
            for entry in kept:
                self._add(entry)

    def _entries(self) -> list[dict[str, Any]]:
        """Returns those of an earlier run; damaged ones are left out, with a warning."""
        if not self._path.exists():
            return []
        entries = []
        # The last line has no end: it is empty, or was cut off.
        lines = self._path.read_bytes().split(b"\n")[:-1]
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                entry = files.parse(line.decode())
                is_entry = isinstance(entry, dict) and type(entry.get("step")) is int
                if is_entry and all(
                    isinstance(v, int | float) and math.isfinite(v) for v in entry.values()
                ):
                    entries.append(entry)
        if count := len(lines) - len(entries):
            log.warning("%s: %d damaged lines are left out", self._path, count)
        return entries

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        with files.named_errors(self._path):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        if self._events is not None:
            self._add({"step": step, **metrics})

    def _add(self, entry: Mapping[str, float]) -> None:
        for name, value in entry.items():
            if name != "step":
                self._events.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
