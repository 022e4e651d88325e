"""The log of a search: a line of JSON each evaluation, from which a killed search goes on."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from kdq.search.problem import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A policy that was tried."""

    policy: Policy
    chosen: Mapping[str, str]  # the same by names
    scores: Mapping[str, float]  # by objective
    costs: Mapping[str, float]  # by metric
    seconds: float  # since the search began, of all its processes


class History:
    """Evaluations in the order in which they were made; on disk before the next one begins."""

    def __init__(self, path: Path):
        """Opens the log; a last line that was cut off is dropped."""
        self._path = path
        self.evaluations: list[Evaluation] = []
        whole = b""
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                fields = json.loads(line)
                fields["policy"] = tuple(fields["policy"])
                self.evaluations.append(Evaluation(**fields))
                whole += line
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 closed by `close`
        self._file.truncate(len(whole))

    def add(self, evaluation: Evaluation) -> None:
        line = json.dumps(dataclasses.asdict(evaluation), allow_nan=False)
        self._file.write(f"{line}\n".encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.evaluations.append(evaluation)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
