"""Training curves as JSON lines: one object an entry, never a duplicate after a resume."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from kdq import processes


class MetricsWriter:
    """Appends `{"step": ..., name: value}` lines to a file.

    Args:
      path: the file; its folder must exist.
      after_step: entries of a run that was cut off past this step are dropped, since the resumed
        run writes them again.

    Of several processes the first writes, and the others do nothing.
    """

    def __init__(self, path: str | os.PathLike[str], after_step: int = 0):
        self._file = None
        if not processes.is_first():
            return
        self._path = Path(path)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= after_step]
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text("".join(f"{line}\n" for line in kept) if after_step else "")
        os.replace(scratch, self._path)
        self._file = self._path.open("a")

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        lines = self._path.read_text().split("\n")
        return [line for line in lines[:-1] if line]  # the last has no newline: it was cut off

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
