"""The error of this package, and the wording that its errors share."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """A data set, a split or a file that cannot be used as asked; the message says what to do."""


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the valid name closest to `given`, or an empty string."""
    close = difflib.get_close_matches(given, list(valid), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
