"""The error of this package."""

from typing import Any

from kdq.fields import Mistake


class DataError(Mistake, ValueError):
    """A data set, a split or a file that cannot be used as asked; the message says what to do."""


def damaged(name: str, folder: Any, error: Exception) -> DataError:
    """Returns the error for a prepared data set that can't be read."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    return DataError(
        f"{name} in {folder} can't be read ({reason}): remove that folder and prepare it again"
    )
