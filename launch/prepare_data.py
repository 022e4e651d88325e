"""Prepare a data set of the MNIST family for TFDS from local IDX files, without TensorFlow.

python launch/prepare_data.py --dataset=fashion_mnist --source=DIR --data_dir=DIR

The source directory holds the four files under their official names, gzipped or not:
  mnist, fashion_mnist, kmnist: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]
  emnist/CONFIG: emnist-CONFIG-{train,test}-{images-idx3,labels-idx1}-ubyte[.gz]
CONFIG is byclass, bymerge, balanced, letters, digits or mnist. Afterwards plain
`tfds.data_source('fashion_mnist', data_dir=DIR)` and kdq both read the data set.
"""

import sys

from absl import app, flags

from kdq.data import DataError, prepare

_DATASET = flags.DEFINE_string("dataset", None, "mnist, fashion_mnist, kmnist or emnist/CONFIG.")
_SOURCE = flags.DEFINE_string("source", None, "Directory with the IDX files.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "TFDS data directory; default $TFDS_DATA_DIR, else ~/tensorflow_datasets."
)


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        directory = prepare(_DATASET.value, _SOURCE.value, _DATA_DIR.value)
    except (DataError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    print(f"{_DATASET.value} is prepared in {directory}")
    return 0


if __name__ == "__main__":
    flags.mark_flags_as_required(["dataset", "source"])
    app.run(main)
