"""Where examples come from: data sets of TFDS, arrays in files and in memory."""

from pathlib import Path

from kdq.data.source import Source
from kdq.data.sources import arrays, tfds
from kdq.fields import expand_user


def open_split(
    name: str, split: str, *, data_dir: str | Path | None = None, in_memory: bool | None = None
) -> Source:
    """Opens a split of a prepared TFDS data set (`digits` is prepared on first use), or of arrays.

    Args:
      name: TFDS name, with config and version where needed: `mnist`, `emnist/balanced`, `cifar10`;
        or an `.npz` file, see `kdq.data.save_arrays`.
      split: TFDS split syntax: `train`, `train[:90%]`, `train[54000:]`; of an `.npz` file a name.
      data_dir: TFDS data directory, TFDS's default when None; of an `.npz` file its folder.
      in_memory: read everything once and serve it from memory; when None, if the pixels take less
        than 2 GiB.

    Raises:
      DataError: an unknown data set or split, a data set that is not prepared, not readable at
        random, or not for image classification.
    """
    if name.endswith(".npz"):
        return arrays.open_file(Path(expand_user(Path(data_dir or "", name), "data")), split)
    return tfds.open_prepared(name, split, data_dir, in_memory)
