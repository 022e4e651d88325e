"""Photographs that packages of Debian hold, as crops to calibrate and to evaluate networks on.

    python benchmarks/photographs.py --out=data/photographs.npz

They have no labels: a quantized network is compared with its float self. `photographs.json` lists
them by package and file; apt-get downloads the packages, which are not installed. Each photograph
is on one side only, by a hash of its name, and near-duplicates are dropped before that. The file
holds uint8 arrays "calibrate" and "evaluate" [n, 224, 224, 3] and their "calibrate_names" and
"evaluate_names".
"""

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

OUT = flags.DEFINE_string("out", "data/photographs.npz", "The file to write.")
DEBS = flags.DEFINE_string("debs", None, "Folder with the packages, if they are there already.")
CROPS = flags.DEFINE_integer("crops", 2, "Crops of each photograph to calibrate on.", lower_bound=1)

LIST = Path(__file__).with_suffix(".json")
SHORT_SIDE, CROP = 256, 224
CALIBRATE_SHARE = 1 / 3
SAME_BITS = 10  # of 64 that may differ between the difference hashes of one scene


def main(_: Sequence[str]) -> None:
    listed = json.loads(LIST.read_text())
    with tempfile.TemporaryDirectory() as downloads:
        folder = Path(DEBS.value or downloads)
        if not DEBS.value:
            subprocess.run(["apt-get", "download", "-qq", *listed], cwd=folder, check=True)
        images = [entry for package in listed for entry in read(folder, package, listed[package])]
    images = drop_near_duplicates(images)
    sides: dict[str, tuple[list[np.ndarray], list[str]]] = {
        "calibrate": ([], []),
        "evaluate": ([], []),
    }
    for name, image in images:
        share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
        side, count = ("calibrate", CROPS.value) if share < CALIBRATE_SHARE else ("evaluate", 1)
        crops, names = sides[side]
        crops += cut(image, count)
        names += [name] * count
    arrays = {side: np.stack(crops) for side, (crops, _) in sides.items()}
    arrays |= {f"{side}_names": np.asarray(names) for side, (_, names) in sides.items()}
    Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
    np.savez(OUT.value, **arrays)
    counts = ", ".join(f"{len(set(names))} to {side}" for side, (_, names) in sides.items())
    print(f"{len(images)} photographs: {counts}; {OUT.value}")


def read(folder: Path, package: str, paths: Sequence[str]) -> Iterator[tuple[str, Image.Image]]:
    """Yields the listed photographs of a package, with "package/file" as their names."""
    (deb,) = folder.glob(f"{package}_*.deb")
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as archive:
        for path in paths:
            image = Image.open(archive.extractfile(f"./{path}"))
            image.draft("RGB", (2 * SHORT_SIDE, 2 * SHORT_SIDE))  # decodes large ones faster
            yield f"{package}/{path}", image.convert("RGB")


def drop_near_duplicates(
    images: Sequence[tuple[str, Image.Image]],
) -> list[tuple[str, Image.Image]]:
    """Returns the images whose difference hash is far from that of any before."""
    kept, hashes = [], []
    for name, image in images:
        small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), int)
        bits = (small[:, 1:] > small[:, :-1]).ravel()
        if all(np.count_nonzero(bits != other) > SAME_BITS for other in hashes):
            kept.append((name, image))
            hashes.append(bits)
    return kept


def cut(image: Image.Image, count: int) -> list[np.ndarray]:
    """Returns crops [224, 224, 3] of an image of 256 pixels along its short side.

    The first is the middle; further ones are spread along the long side.
    """
    scale = SHORT_SIDE / min(image.size)
    width, height = (max(SHORT_SIDE, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    shares = [0.5, *np.linspace(0, 1, count - 1)] if count > 2 else [0.5, 0.0][:count]
    crops = []
    for share in shares:
        left, top = round(share * (width - CROP)), round(share * (height - CROP))
        crops.append(np.asarray(image.crop((left, top, left + CROP, top + CROP))))
    return crops


if __name__ == "__main__":
    app.run(main)
