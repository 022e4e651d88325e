"""Digests of trees: of whole arrays, and of arrays in parts."""

import hashlib
import json
import re
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kdq.train import digests


class Moments(NamedTuple):
    mean: Any
    count: Any


class State(flax.struct.PyTreeNode):
    params: Any
    moments: Moments


W = np.arange(12, dtype=np.float32).reshape(3, 4)


def digest(tree):
    """The digests as they are read again."""
    return digests.parse(json.loads(json.dumps(digests.make_digests(tree))))


def tree():
    return {"a": {"w": W}, "n": np.int32(7), "half": np.ones(3, ml_dtypes.bfloat16), "none": {}}


def test_a_digest_is_the_sha256_of_dtype_shape_path_and_bytes():
    found = digest(tree())
    assert set(found) == {("a", "w"), ("n",), ("half",), ("none",)}
    assert found["none",] == ("empty", {})
    assert found["a", "w"] == (
        "float32[3, 4]",
        {((0, 3), (0, 4)): hashlib.sha256(W.tobytes()).hexdigest()},
    )
    assert found["n",] == ("int32[]", {(): hashlib.sha256(np.int32(7).tobytes()).hexdigest()})
    half = np.ones(3, ml_dtypes.bfloat16).tobytes()
    assert found["half",] == ("bfloat16[3]", {((0, 3),): hashlib.sha256(half).hexdigest()})
    assert digests.difference(jax.tree.map(jnp.asarray, tree()), found) is None


def test_a_dataclass_is_as_the_dicts_that_it_is_read_as():
    state = State(params={"w": W}, moments=Moments(mean=W, count=np.int32(1)))
    read = {"params": {"w": W}, "moments": {"mean": W, "count": np.int32(1)}}
    assert digests.difference(read, digest(state)) is None
    assert digests.difference([W], digest({"0": W})) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": {"w": W.astype(np.float64)}}, r"a/w is float64\[3, 4\], was float32\[3, 4\]"),
        ({"a": {"w": W.reshape(4, 3)}}, r"a/w is float32\[4, 3\], was float32\[3, 4\]"),
        ({"a": {"w": np.where(W == 5, 4.0, W).astype(np.float32)}}, "a/w has other values"),
        ({"a": {"w": -W}}, "a/w has other values"),
        ({"a": {"v": W}}, "the arrays are others: a/v, a/w"),
        ({"a/w": W, "a": {}}, "the arrays are others: a/w, a/w"),
        ({"n": np.int32(8)}, "n has other values"),
    ],
)
def test_what_differs_is_named(change, message):
    assert np.signbit(-W).any()  # -0.0 == 0.0, and is another value
    difference = digests.difference({**tree(), **change}, digest(tree()))
    assert difference is not None
    assert re.match(message, difference), difference


# In parts, over the devices of two processes.


class Shard(NamedTuple):
    index: tuple[slice, ...]
    replica_id: int
    data: np.ndarray


class Scattered:
    """What one of two processes sees of an array on a grid of 2 x 2 devices, a row of it each.

    Each axis of the array is cut along an axis of the grid, "x" or "y", or along none.
    """

    def __init__(self, array, axes, process):
        self.array, self.dtype, self.shape, self.sharding = array, array.dtype, array.shape, self
        self.axes = (*axes, *[None] * (array.ndim - len(axes)))
        seen = {}
        self.addressable_shards = []
        for x, y in np.ndindex(2, 2):
            index = self._index({"x": x, "y": y})
            replica = seen[str(index)] = seen.get(str(index), -1) + 1
            if x == process:
                self.addressable_shards.append(Shard(index, replica, array[index]))

    def _index(self, place):
        halves = zip(self.axes, self.shape, strict=True)
        return tuple(
            slice(None) if axis is None else slice(place[axis] * n // 2, (place[axis] + 1) * n // 2)
            for axis, n in halves
        )

    def devices_indices_map(self, shape):
        return {(x, y): self._index({"x": x, "y": y}) for x, y in np.ndindex(2, 2)}

    def __array__(self, dtype=None, copy=None):
        """As `whole` gets it from all processes."""
        return self.array


ARRAY = np.arange(32, dtype=np.float32).reshape(8, 4)
AXES = [(), ("x",), ("y",), ("x", "y"), (None, "y"), ("y", "x")]


@pytest.fixture(autouse=True)
def scattered(monkeypatch):
    monkeypatch.setattr(digests, "_is_scattered", lambda x: isinstance(x, Scattered))


def of_both(array, axes):
    """The digests of both processes, and those of each."""
    each = [digests.make_digests({"w": Scattered(array, axes, process)}) for process in (0, 1)]
    return digests.parse(each[0] + each[1]), [digests.parse(rows) for rows in each]


def test_each_part_has_a_digest_once():
    halves = {
        ((0, 4), (0, 4)): hashlib.sha256(ARRAY[:4].tobytes()).hexdigest(),
        ((4, 8), (0, 4)): hashlib.sha256(ARRAY[4:].tobytes()).hexdigest(),
    }
    found, each = of_both(ARRAY, ("x",))
    assert found["w",] == ("float32[8, 4]", halves)
    assert [len(own["w",][1]) for own in each] == [1, 1]
    found, each = of_both(ARRAY, ())
    assert list(found["w",][1]) == [((0, 8), (0, 4))]
    assert [len(own["w",][1]) for own in each] == [1, 0]


@pytest.mark.parametrize("read", [*AXES, "numpy"], ids=str)
@pytest.mark.parametrize("saved", AXES, ids=str)
def test_an_array_may_be_cut_up_in_another_way_when_it_is_read(saved, read):
    expected, _ = of_both(ARRAY, saved)

    def differences(array):
        if read == "numpy":
            return [digests.difference({"w": array}, expected)]
        both = [Scattered(array, read, process) for process in (0, 1)]
        return [digests.difference({"w": own}, expected) for own in both]

    assert set(differences(ARRAY)) == {None}
    for row, column in ((0, 0), (5, 3)):
        other = ARRAY.copy()
        other[row, column] += 1
        # One of the processes notices it.
        assert "w has other values than were saved" in differences(other)


def test_a_part_that_nobody_told_of_is_noticed():
    expected, (first, _) = of_both(ARRAY, ("x",))
    assert digests.difference({"w": ARRAY}, first) == "w has parts without a digest"
    assert digests.difference({"w": ARRAY}, expected) is None


def test_a_part_without_arrays_is_told_of_too():
    """A flipped bit renamed one, and a tree came back that is none of what was saved."""
    tree = {"params": {"w": np.ones(2, np.float32)}, "adapters": {}}
    expected = digest(tree)
    assert digests.difference(tree, expected) is None
    renamed = {"params": tree["params"], "adaptery": {}}
    assert digests.difference(renamed, expected) == "an empty part is not there: adapters"
    assert digests.difference({"params": tree["params"]}, expected) is not None
