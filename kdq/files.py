"""Files that are either the old one or the new one, never half of one; JSON that shows damage.

A JSON object that kdq writes carries a seal: `"seal": "sha256:..."`, the digest of all the rest.
One without is from before there were seals, or somebody else's, and is read as it is.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdq.fields import ConfigError

SEAL = "seal"
_SEAL_VALUE = re.compile(r"sha256:[0-9a-f]{64}")


class DamagedError(ConfigError):
    """A file whose contents are not what was written; the message names it."""


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces the file at `path`; a reader, or a run that is killed, never sees part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory: os.replace is atomic only within a file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with named_errors(path):
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            # mkstemp makes it private; a report is as readable as any other file.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the path to an OSError that has none: a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def json_text(document: Any, *, indent: int | None = 1) -> str:
    """Returns an object, or a list of objects, as JSON with seals, ending in a newline.

    NaN and infinity, which JSON lacks, become null, see `plain`.
    """
    document = plain(document)
    sealed = [seal(entry) for entry in document] if isinstance(document, list) else seal(document)
    separators = (",", ":") if indent is None else None
    return json.dumps(sealed, indent=indent, separators=separators, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: NumPy's numbers as Python's, tuples as lists, and null for a
    number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | os.PathLike[str], document: Any, *, indent: int | None = 1) -> None:
    """Replaces the file at `path` with an object or a list of objects, see `json_text`."""
    write_atomic(path, json_text(document, indent=indent).encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns what a JSON file holds, without its seals.

    Raises:
      DamagedError: it is no JSON, or not what its seal says.
      OSError: it can't be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise DamagedError(f"{path} is no regular file")
    try:
        document = parse(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} can't be read as JSON: {error}") from error
    entries = document if isinstance(document, list) else [document]
    try:
        entries = [unseal(entry) for entry in entries]
    except DamagedError as error:
        raise DamagedError(f"{path} is damaged, or was edited: {error}") from error
    return entries if isinstance(document, list) else entries[0]


def parse(text: str) -> Any:
    """Returns what a text of JSON holds. Raises ValueError or RecursionError if it is none."""
    document = json.loads(text)
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character could not be written again
        json.dumps(document, ensure_ascii=False).encode()
    return document


def seal(entry: Any) -> Any:
    """Returns a JSON object with its seal, in place of an older one; what is no object as it is."""
    if not isinstance(entry, Mapping):
        return entry
    rest = {key: value for key, value in entry.items() if key != SEAL}
    return {**rest, SEAL: _seal_of(rest)}


def unseal(entry: Any) -> Any:
    """Returns a JSON value without its seal, if it has one. Raises DamagedError for a wrong one."""
    if not isinstance(entry, Mapping):
        return entry
    # Damage to the key alone leaves the value to be seen.
    values = [v for v in entry.values() if isinstance(v, str) and _SEAL_VALUE.fullmatch(v)]
    if SEAL not in entry and not values:
        return entry
    rest = {key: value for key, value in entry.items() if key != SEAL}
    try:
        expected = _seal_of(rest)
    except (ValueError, RecursionError) as error:
        raise DamagedError(str(error)) from error
    if entry.get(SEAL) != expected:
        raise DamagedError("its contents are not those of its seal (an edit takes that key out)")
    return rest


def _seal_of(entry: Mapping[str, Any]) -> str:
    """Returns the digest of an object's values, whatever their order."""
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    # As it will be read: keys that are no text become text.
    text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
