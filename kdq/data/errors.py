"""The error of this package."""

from kdq.fields import Mistake


class DataError(Mistake, ValueError):
    """A data set, a split or a file that cannot be used as asked; the message says what to do."""
