"""Digests of the arrays of a tree: by leaf, wherever its parts lie."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
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


def make_digests(tree: Any) -> list[dict[str, Any]]:
    """Returns what this process has to tell of a tree of arrays, for JSON; see `parse`.

    Of an array that is cut up over several processes each tells of its own parts; a part that
    several have, the first of them tells of.
    """
    rows = []
    for path, x in _leaves(tree):
        parts = [] if _is_empty(x) else [[place, _sha(data)] for place, data in _parts(x)]
        array = EMPTY if _is_empty(x) else _describe(x)
        rows.append({"path": list(path), "array": array, "parts": parts})
    return rows


def parse(rows: Iterable[Mapping[str, Any]]) -> Digests:
    """Returns the digests of what all processes told.

    Raises KeyError, TypeError or ValueError for what `make_digests` did not return.
    """
    digests: Digests = {}
    for row in rows:
        parts = {tuple((a, b) for a, b in bounds): sha for bounds, sha in row["parts"]}
        digests.setdefault(tuple(row["path"]), (row["array"], {}))[1].update(parts)
    return digests


def difference(tree: Any, expected: Digests) -> str | None:
    """Returns what of a tree is not as the digests (of all processes) say; None if all is.

    An array may be cut up in another way than the one that the digests were taken of. All processes
    have to ask, and each answers for the parts that it has.
    """
    nodes = dict(_leaves(tree))
    leaves = {path: x for path, x in nodes.items() if not _is_empty(x)}
    empty = {path for path, (description, _) in expected.items() if description == EMPTY}
    arrays = expected.keys() - empty
    if leaves.keys() != arrays:
        return f"the arrays are others: {_some(leaves.keys() ^ arrays)}"
    if lost := empty - nodes.keys():
        return f"an empty part is not there: {_some(lost)}"
    wrong = None
    size = lambda bounds: int(np.prod([b - a for a, b in bounds]))
    for path, x in leaves.items():  # to the end: the other processes wait at the same arrays
        description, parts = expected[path]
        all_of_it = _bounds(x)
        # Parts do not overlap: they make up the whole if their sizes do.
        covered = sum(map(size, parts)) == size(all_of_it)
        if _describe(x) != description:
            wrong = wrong or f"{'/'.join(path)} is {_describe(x)}, was {description}"
        elif not covered or not all(_is_within(part, all_of_it) for part in parts):
            wrong = wrong or f"{'/'.join(path)} has parts without a digest"
        elif any(_sha(array) != parts[bounds] for bounds, array in _cut(x, parts)):
            wrong = wrong or f"{'/'.join(path)} has other values than were saved"
    return wrong


def _is_empty(node: Any) -> bool:
    """Returns whether it is None or an empty container, which no array tells of."""
    return node is None or (isinstance(node, Mapping | tuple | list) and not node)


def _leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    """By names that are the same in a dataclass, a tuple and the nested dicts that they become."""
    for path, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)[0]:
        yield tuple(jax.tree_util.keystr((key,), simple=True) for key in path), x


def _describe(x: Any) -> str:
    return f"{x.dtype.name}{list(np.shape(x))}"


def _is_scattered(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _parts(x: Any) -> Iterator[tuple[Bounds, Any]]:
    """Yields the parts of an array that this process tells of."""
    if not _is_scattered(x):
        yield _bounds(x), np.asarray(x)
        return
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            yield _bounds(x, shard.index), shard.data


def _cut(x: Any, bounds: Iterable[Bounds]) -> Iterator[tuple[Bounds, Any]]:
    """Yields parts of an array, as cut up for its digests, that this process can look at."""
    if _is_scattered(x):
        places = {_bounds(x, i) for i in x.sharding.devices_indices_map(x.shape).values()}
        if not all(any(_is_within(b, place) for place in places) for b in bounds):
            x = whole(x)  # cut up across those: no device has one of them whole
    for place, data in _parts(x):
        for part in filter(lambda b: _is_within(b, place), bounds):
            ends = zip(part, place, strict=True)
            yield part, data[tuple(slice(a - start, b - start) for (a, b), (start, _) in ends)]


def _bounds(x: Any, index: tuple[slice, ...] | None = None) -> Bounds:
    shape = np.shape(x)
    index = index or (slice(None),) * len(shape)
    return tuple(place.indices(size)[:2] for place, size in zip(index, shape, strict=True))


def _is_within(bounds: Bounds, place: Bounds) -> bool:
    return all(c <= a and b <= d for (a, b), (c, d) in zip(bounds, place, strict=True))


def _sha(array: Any) -> str:
    data = np.ascontiguousarray(np.asarray(array))
    return hashlib.sha256(data.reshape(-1).view(np.uint8) if data.size else b"").hexdigest()


def _some(paths: Iterable[Path]) -> str:
    names = sorted("/".join(path) for path in paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
