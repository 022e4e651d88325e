"""Models by the name `package.module:Class`: found, described, told apart by their source."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import linen as nn

from kdq import models
from kdq.config import ConfigError

HERE = __name__


class Net(nn.Module):
    width: int = 4
    widths: tuple[int, ...] = (1, 2)
    dtype: type = jnp.float32
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, inputs, *, train: bool = False):
        return nn.Dense(self.width, dtype=self.dtype)(self.activation(inputs))


class Blind(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(2)(inputs)


def test_what_is_described_is_built_again():
    for model in (Net(), Net(width=3, widths=[5, 6]), Net(dtype=jnp.bfloat16, name="mine")):
        fields = models.describe(model)
        built = models.build(**fields)
        assert type(built) is Net
        assert jnp.dtype(built.dtype) == jnp.dtype(model.dtype)
        assert built.width == model.width
        assert built.widths == tuple(model.widths)
    fields = {"width": 4, "widths": (1, 2), "dtype": "bfloat16"}
    assert models.describe(Net(dtype=jnp.bfloat16)) == {"name": f"{HERE}:Net", **fields}
    built_in = models.build("mlp", num_classes=3, dtype="float32")
    assert models.build(**models.describe(built_in)) == built_in


def test_what_can_not_be_described():
    class Local(Net):
        pass

    with pytest.raises(ConfigError, match="defined in a function: move it to the module itself"):
        models.describe(Local())
    with pytest.raises(ConfigError, match=r"Net.activation=.*make it the field's default"):
        models.describe(Net(activation=nn.gelu))
    stale = dataclasses.replace(Net())
    object.__setattr__(stale, "__class__", type("Net", (Net,), {"__module__": HERE}))
    with pytest.raises(ConfigError, match="was defined anew: make it again"):
        models.describe(stale)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Net", r"No module named 'no_such_module'; expected package.module:Class"),
        (f"{HERE}:Nett", r"unknown class of .* 'Nett' \(did you mean 'Net'\?\); valid: Net, Blind"),
        (
            "__main__:Netz",
            "is of another program, a script .*; a class that several use must be in a module",
        ),
        (f"{HERE}:pytest", "is no class of flax.linen.Module"),
        (f"{HERE}:Blind", r"__call__ takes \['inputs'\]; expected `train: bool` by"),
    ],
)
def test_names_that_are_no_model(name, message):
    with pytest.raises(ConfigError, match=message):
        models.build(name)


SOURCE = """
from flax import linen as nn

def half(x):
    return x / 2

def unused(x):
    return x

class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return half(nn.Dense(4)(x))

class Base(nn.Module):
    def finish(self, x):
        return x + 1

class Net(Base):
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        return self.finish(Block()(x))
"""


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("Block()(x)", "Block()(2 * x)", True),
        ("x / 2", "x / 3", True),
        ("Dense(4)", "Dense(5)", True),
        ("x + 1", "x - 1", True),
        ("nn.relu", "nn.gelu", True),
        ("    return x\n", "    return x + 7\n", False),
    ],
)
def test_a_digest_follows_what_a_class_uses(tmp_path: Path, monkeypatch, old, new, changes):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for number, text in enumerate((SOURCE, SOURCE.replace(old, new), SOURCE)):
        (tmp_path / f"nets_{number}.py").write_text(text)
        digests.append(models.source_digest(f"nets_{number}:Net"))
        del sys.modules[f"nets_{number}"]
    assert (digests[1] != digests[0]) == changes
    assert digests[2] == digests[0]
