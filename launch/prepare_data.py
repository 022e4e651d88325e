"""Prepares a data set of the MNIST family for TFDS from local IDX files, without TensorFlow.

python launch/prepare_data.py --dataset=fashion_mnist --source=DIR --data_dir=DIR

The source directory holds the four files under their official names, gzipped or not:
  mnist, fashion_mnist, kmnist: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]
  emnist/CONFIG: emnist-CONFIG-{train,test}-{images-idx3,labels-idx1}-ubyte[.gz]
CONFIG is byclass, bymerge, balanced, letters, digits or mnist. Afterwards both kdq and plain
`tfds.data_source('fashion_mnist', data_dir=DIR)` can read the data set.
"""

from absl import flags

from kdq import cli

DATASET = flags.DEFINE_string("dataset", None, "mnist, fashion_mnist, kmnist or emnist/CONFIG.")
SOURCE = cli.define_path("source", None, "Directory with the IDX files.")
DATA_DIR = cli.define_path(
    "data_dir", None, "TFDS data directory; default $TFDS_DATA_DIR, or ~/tensorflow_datasets."
)


def main(_: list[str]) -> None:
    from kdq import data

    directory = data.prepare(DATASET.value, SOURCE.value, DATA_DIR.value)
    print(f"{DATASET.value} is prepared in {directory}")


if __name__ == "__main__":
    cli.run(main, required=["dataset", "source"])
