"""Training curves as JSON lines: one object an entry, never a duplicate after a resume.

With a folder for them, the same as TensorBoard's events.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from kdq import processes
from kdq.fields import ConfigError


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
        kept = [line for line in self._lines() if json.loads(line)["step"] <= after_step]
        kept = kept if after_step else []
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text("".join(f"{line}\n" for line in kept))
        os.replace(scratch, self._path)
        self._file = self._path.open("a")
        if events is not None:
            shutil.rmtree(events, ignore_errors=True)  # a file of events can't be cut
            self._events = tensorboard().SummaryWriter(str(events))
            for line in kept:
                self._add(json.loads(line))

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
