"""The error of this package."""


class DataError(ValueError):
    """A data set, a split or a file that cannot be used as asked; the message says what to do."""
