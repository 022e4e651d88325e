"""The log of a search: a line of JSON an evaluation, from which a killed search resumes."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from kdq import files
from kdq.search.problem import Policy

log = logging.getLogger(__name__)


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
        """Opens the log; from the first line that is damaged or cut off it is made again."""
        self._path = path
        self.evaluations: list[Evaluation] = []
        whole = b""
        for number, line in enumerate(_lines(path), start=1):
            try:
                self.evaluations.append(_evaluation(line))
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                log.warning(
                    "%s, line %d: damaged (%s); from there on made again", path, number, error
                )
                break
            whole += line
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 closed by `close`
        self._file.truncate(len(whole))

    def add(self, evaluation: Evaluation) -> None:
        line = files.json_text(dataclasses.asdict(evaluation), indent=None)
        with files.named_errors(self._path):
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.evaluations.append(evaluation)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lines(path: Path) -> list[bytes]:
    """Returns the lines of a file that have an end."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [line + b"\n" for line in lines[:-1]]


def _evaluation(line: bytes) -> Evaluation:
    """Returns an evaluation that `History.add` wrote; raises some error for anything else."""
    fields = files.unseal(files.parse(line.decode()))
    evaluation = Evaluation(**{**fields, "policy": tuple(fields["policy"])})
    for numbers in (evaluation.scores, evaluation.costs, {"seconds": evaluation.seconds}):
        for name, value in numbers.items():
            if not isinstance(value, int | float):
                raise TypeError(f"{name}={value!r} is no number")
    return evaluation
