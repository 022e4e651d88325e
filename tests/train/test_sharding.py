"""What of an array lies where, by rules on paths; the runs themselves: tests/experiment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from kdq import schema
from kdq.config import ConfigError
from kdq.train.sharding import AXES, ONE_DEVICE, Layout, make_layout


def specs(tree, *, sizes=(2, 4, 2), rules=(), least=0):
    layout = Layout(AbstractMesh(sizes, AXES), rules, least)
    return jax.tree.map(lambda one: one.spec, layout.shardings(tree))


def test_features_by_tensor_and_the_largest_other_axis_by_fsdp():
    tree = {"conv": jnp.zeros((3, 3, 8, 6)), "dense": jnp.zeros((12, 10)), "bias": jnp.zeros(64)}
    assert specs(tree) == {
        "conv": PartitionSpec(None, None, "fsdp", "tensor"),
        "dense": PartitionSpec("fsdp", "tensor"),
        "bias": PartitionSpec(),
    }


def test_an_axis_that_is_no_multiple_stays_whole():
    tree = {"odd": jnp.zeros((8, 5)), "both": jnp.zeros((6, 7)), "second": jnp.zeros((64, 12))}
    assert specs(tree) == {
        "odd": PartitionSpec("fsdp", None),
        "both": PartitionSpec(None, None),
        "second": PartitionSpec("fsdp", "tensor"),
    }


def test_small_arrays_stay_whole():
    tree = {"small": jnp.zeros((8, 8)), "large": jnp.zeros((8, 16))}
    found = specs(tree, least=100)
    assert found == {"small": PartitionSpec(), "large": PartitionSpec("fsdp", "tensor")}


def test_the_first_rule_that_fits_wins_for_the_moments_too():
    rules = (("head/kernel", (None, "tensor")), ("head", ("tensor", None)), ("kernel", ("fsdp",)))
    tree = {
        "params": {"head": {"kernel": jnp.zeros((8, 8))}},
        "opt": ({"mu": {"params": {"head": {"kernel": jnp.zeros((8, 8))}}}},),
        "scales": {"head/weights": {"scale": jnp.zeros((8, 2))}},
    }
    found = specs(tree, rules=rules)
    assert found["params"] == found["opt"][0]["mu"]["params"]
    assert found["params"] == {"head": {"kernel": PartitionSpec(None, "tensor")}}
    assert found["scales"]["head/weights"]["scale"] == PartitionSpec("tensor", None)


def test_a_rule_that_does_not_divide_is_an_error():
    with pytest.raises(ConfigError, match=r"head/kernel \(8, 5\).*5 is no multiple of tensor=2"):
        specs({"head": {"kernel": jnp.zeros((8, 5))}}, rules=(("head", (None, "tensor")),))


def test_one_device_is_the_default_and_changes_nothing():
    layout = make_layout(schema.Mesh())
    assert layout == ONE_DEVICE
    tree = {"x": jnp.ones(3)}
    for same in (layout.place, layout.batch, layout.fetch, layout.constrain):
        assert same(tree) is tree
    copied = layout.copy({"x": np.arange(3.0)})["x"]
    assert copied.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(copied, [0, 1, 2])
    assert layout.rows_of(64) == (0, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": 1000}, "data=1000.*there are"),
        ({"data": 0}, "expected sizes of at least 1"),
        ({"data": -1, "fsdp": -1}, "or one -1"),
        ({"rules": ({"path": "head", "axes": (None, "model")},)}, "unknown axes.*'model'.*tensor"),
    ],
)
def test_what_no_mesh_can_be(given, message):
    with pytest.raises(ConfigError, match=message):
        make_layout(schema.Mesh(**given))
