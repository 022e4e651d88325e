"""Digests of the arrays of a tree: by leaf, wherever its parts lie."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdq.train.sharding import whole

Path = tuple[str, ...]
Bounds = tuple[tuple[int, int], ...]  # of each axis: from, to
# By the path of an array: its dtype and shape in words, and the SHA-256 of each of its parts. Of an
# empty container and of None: EMPTY, and no parts.
Digests = dict[Path, tuple[str, dict[Bounds, str]]]
EMPTY = "empty"


def make_digests(tree: Any) -> Digests:
    """Returns the digests of what this process has to tell of a tree of arrays.

    Of an array that is cut up over several processes each tells of its own parts; a part that
    several have, the first of them tells of.
    """
    arrays = {path: (_describe(x), dict(_parts(x))) for path, x in _leaves(tree)}
    return arrays | {path: (EMPTY, {}) for path in _empty(tree)}


def difference(tree: Any, expected: Digests) -> str | None:
    """Returns what of a tree is not as the digests say, in words; None if all is.

    An array may be cut up in another way than the one that the digests were taken of. All processes
    have to ask, and each answers for the parts that it has.

    Args:
      tree: of arrays.
      expected: from `make_digests`, of all processes.
    """
    leaves = dict(_leaves(tree))
    empty = {path for path, (description, _) in expected.items() if description == EMPTY}
    arrays = expected.keys() - empty
    if leaves.keys() != arrays:
        return f"the arrays are others: {_some(leaves.keys() ^ arrays)}"
    if lost := empty - _empty(tree):
        return f"an empty part is not there: {_some(lost)}"
    wrong = None
    for path, x in leaves.items():  # to the end: the other processes wait at the same arrays
        description, parts = expected[path]
        if _describe(x) != description:
            wrong = wrong or f"{'/'.join(path)} is {_describe(x)}, was {description}"
        elif not _covered(_bounds(x, None), parts):
            wrong = wrong or f"{'/'.join(path)} has parts without a digest"
        elif any(_sha(array) != parts[bounds] for bounds, array in _cut(x, parts)):
            wrong = wrong or f"{'/'.join(path)} has other values than were saved"
    return wrong


def merge(several: Iterable[Digests]) -> Digests:
    """Returns the digests of all processes as those of one."""
    merged: Digests = {}
    for digests in several:
        for path, (description, parts) in digests.items():
            merged.setdefault(path, (description, {}))[1].update(parts)
    return merged


def to_json(digests: Digests) -> list[dict[str, Any]]:
    return [
        {"path": list(path), "array": description, "parts": [[*item] for item in parts.items()]}
        for path, (description, parts) in digests.items()
    ]


def from_json(rows: Sequence[Mapping[str, Any]]) -> Digests:
    """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
    return {
        tuple(row["path"]): (
            row["array"],
            {tuple((a, b) for a, b in bounds): sha for bounds, sha in row["parts"]},
        )
        for row in rows
    }


def _leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    """By names that are the same in a dataclass, a tuple and the nested dicts that they become."""
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(jax.tree_util.keystr((key,), simple=True) for key in path), x


def _empty(tree: Any) -> set[Path]:
    """Returns the paths of empty containers and None, which no array tells of."""
    is_empty = lambda node: node is None or (isinstance(node, Mapping | tuple | list) and not node)
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)[0]
    name = lambda key: jax.tree_util.keystr((key,), simple=True)
    return {tuple(map(name, path)) for path, node in nodes if is_empty(node)}


def _describe(x: Any) -> str:
    return f"{x.dtype.name}{list(np.shape(x))}"


def _is_scattered(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _parts(x: Any) -> Iterator[tuple[Bounds, str]]:
    if _is_scattered(x):
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                yield _bounds(x, shard.index), _sha(shard.data)
    else:
        yield _bounds(x, None), _sha(x)


def _cut(x: Any, parts: Iterable[Bounds]) -> Iterator[tuple[Bounds, Any]]:
    """Yields those parts of an array, as cut up for its digests, that this process can look at."""
    if not _is_scattered(x):
        x = np.asarray(x)
        for bounds in parts:
            yield bounds, x[tuple(slice(*ends) for ends in bounds)]
        return
    places = {_bounds(x, i) for i in x.sharding.devices_indices_map(x.shape).values()}
    if not all(any(_is_within(b, place) for place in places) for b in parts):
        # Cut up across the parts: no device has one of them whole.
        yield from _cut(whole(x), parts)
        return
    for shard in x.addressable_shards:
        place = _bounds(x, shard.index)
        if shard.replica_id == 0:
            for bounds in parts:
                if _is_within(bounds, place):
                    starts = [start for start, _ in place]
                    offsets = zip(bounds, starts, strict=True)
                    cut = tuple(slice(a - at, b - at) for (a, b), at in offsets)
                    yield bounds, shard.data[cut]


def _bounds(x: Any, index: tuple[slice, ...] | None) -> Bounds:
    shape = np.shape(x)
    index = index or (slice(None),) * len(shape)
    return tuple(place.indices(size)[:2] for place, size in zip(index, shape, strict=True))


def _is_within(bounds: Bounds, place: Bounds) -> bool:
    return all(c <= a and b <= d for (a, b), (c, d) in zip(bounds, place, strict=True))


def _covered(bounds: Bounds, parts: Iterable[Bounds]) -> bool:
    """Returns whether parts, which do not overlap, make up the whole."""
    size = lambda part: int(np.prod([b - a for a, b in part]))
    return sum(map(size, parts)) == size(bounds)


def _sha(array: Any) -> str:
    data = np.ascontiguousarray(np.asarray(array))
    return hashlib.sha256(data.reshape(-1).view(np.uint8) if data.size else b"").hexdigest()


def _some(paths: Iterable[Path]) -> str:
    names = sorted("/".join(path) for path in paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
