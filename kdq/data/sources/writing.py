"""Writing of a TFDS data set, so that it is there in full or not at all."""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import rich.progress
import tensorflow_datasets as tfds
from rich.console import Console

from kdq.data.source import DataError
from kdq.fields import expand_user

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yields `items` under a progress bar where stderr is a terminal: none is in a log file."""
    if not sys.stderr.isatty():
        return iter(items)
    console = Console(stderr=True)
    return rich.progress.track(items, description, total=total, console=console, transient=True)


def default_data_dir() -> Path:
    """Returns where TFDS keeps data sets: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(expand_user(folder, "$TFDS_DATA_DIR"))


def is_prepared(directory: str | Path) -> bool:
    """Tells whether a builder's directory holds a data set that was written to the end."""
    return Path(directory, "dataset_info.json").exists()  # TFDS writes it last


def write_dataset(make_builder: Callable[[str], tfds.core.DatasetBuilder], data_dir: Path) -> Path:
    """Prepares a data set in a scratch directory of `data_dir` and moves it into place by rename.

    `make_builder` maps a data directory to the builder to prepare in it. Returns the data set's
    directory, `data_dir/name[/config]/version`. Raises DataError if something that is not a
    prepared data set is in the way; whatever the builder raises, nothing is left in `data_dir`.
    """
    tfds.disable_progress_bar()  # kdq shows its own, and only on a terminal
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kdq-incomplete-", dir=data_dir) as scratch:
        builder = make_builder(scratch)
        # TFDS prints of a download, which there is none of, and of a directory about to move.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
        written = Path(builder.data_dir)
        target = data_dir / written.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A data set with configs has one more file, which names the default config.
        common = Path(scratch, builder.name, ".config")
        if common.exists():
            shutil.copytree(common, data_dir / builder.name / ".config", dirs_exist_ok=True)
        try:
            written.rename(target)
        except OSError as error:
            # Another process may have finished the same data set first: its copy is as good.
            if not is_prepared(target):
                raise DataError(
                    f"cannot move {builder.name} to {target}: {error.strerror}. What is there is "
                    "not a prepared data set; remove it and run again"
                ) from error
    return target
