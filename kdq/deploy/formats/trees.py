"""Trees of variables as flat arrays that a safetensors file holds, and back without loss.

An array is named by its keys, joined by "/"; what a key must not hold ("/", ":", "%", what is not
ASCII) is percent-encoded. What such names and the dtypes of safetensors do not say is `Structure`:
containers other than dicts, boxes around arrays, and dtypes that are stored as bytes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

NO_LEAF = object()
DEEPEST = 64  # keys in a name; deeper trees overflow the stacks of those who walk them
# What safetensors holds as it is, in every version; other dtypes become bytes.
PLAIN = {"bool", "bfloat16", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_AS_BYTES = {"complex64": np.complex64, "complex128": np.complex128} | {
    name: getattr(ml_dtypes, name)
    for name in dir(ml_dtypes)
    if name.startswith(("float4_", "float6_", "float8_", "int1", "int2", "int4"))
    or name.startswith(("uint1", "uint2", "uint4"))
}
_WIDE = ("int64", "uint64", "float64", "complex128")
_KEY = "key:"  # a PRNG key, followed by the name of its implementation
_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")
_SCALARS = {"bool": bool, "int": int, "float": float, "complex": complex}
_NUMBERS = {"int32": 0, "int64": 0, "float32": 0.0, "float64": 0.0, "complex64": 0j}
_BOXES = {"partitioned": nn.Partitioned, "logically_partitioned": nn.LogicallyPartitioned}

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """All that names and dtypes of the arrays do not say; keys are names as in the file."""

    # "list", "tuple", "none", "dict" (an empty one), a Python scalar ("int"), or a box with the
    # names of its axes: {"partitioned": [null, "model"]}
    nodes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of arrays kept as bytes
    # Arrays that are weakly typed: they take the dtype of what they meet.
    weak: tuple[str, ...] = ()


def name_of(path: Sequence[str]) -> str:
    """Returns the name of the array at these keys."""
    encoded = [quote(key, safe=" ", errors="surrogatepass") for key in path]
    # safetensors has an entry of that name itself.
    escape = lambda key: key.replace("_", "%5F", 1) if key == "__metadata__" else key
    return "/".join(map(escape, encoded))


def path_of(name: str, encoded: bool = True) -> Path:
    """Returns the keys of the array of a name. Raises ValueError for too many of them."""
    if name.count("/") >= DEEPEST:
        raise ValueError(f"{name[:60]!r}...: expected at most {DEEPEST} keys")
    decode = lambda key: unquote(key, errors="surrogatepass")
    return tuple(map(decode, name.split("/")) if encoded else name.split("/"))


def flatten(tree: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a tree by name, and the fields of its `Structure` that are not empty.

    Raises ValueError for what a file can't hold, and says where it is.
    """
    arrays, nodes, dtypes, weak = {}, {}, {}, []
    for path, kind, leaf in _walk(tree, ()):
        name = name_of(path)
        if kind is not None:
            nodes[name] = kind
        if leaf is not NO_LEAF:
            arrays[name], dtype = _stored(leaf, "/".join(path))
            if dtype:
                dtypes[name] = dtype
            if getattr(leaf, "weak_type", False):
                weak.append(name)
    fields = {"nodes": nodes, "dtypes": dtypes, "weak": weak}
    return arrays, {key: value for key, value in fields.items() if value}


def unflatten(
    arrays: Mapping[str, np.ndarray], structure: Structure, *, encoded: bool = True
) -> dict[str, Any]:
    """Returns the tree that was flattened, with JAX arrays.

    Names are percent-encoded (`encoded`), as they were not always. Raises ValueError for names or a
    structure that are no tree's.
    """
    root: dict[str, Any] = {}
    for name in {*structure.dtypes, *structure.weak} - arrays.keys():
        raise ValueError(f"dtypes, weak: there is no array {name!r}")
    for name, array in arrays.items():
        leaf = _restored(array, structure.dtypes.get(name), name)
        if name in structure.weak:
            number = _NUMBERS.get(leaf.dtype.name)
            if number is None:
                raise ValueError(f"weak: {name!r} is {leaf.dtype}, which never is weakly typed")
            # Only what is made from a Python number is weakly typed, and stays so when written to.
            weak = jnp.full(leaf.shape, number)
            leaf = weak.at[...].set(leaf) if weak.dtype == leaf.dtype else leaf
        _insert(root, path_of(name, encoded), leaf)
    # Children before parents, so that a container is complete when it becomes what it was.
    for name in sorted(structure.nodes, key=lambda name: -name.count("/")):
        _convert(root, path_of(name, encoded), structure.nodes[name], name)
    return root


def _walk(node: Any, path: Path) -> Iterator[tuple[Path, Any, Any]]:
    """Yields leaves, and what nodes are that are not dicts with something in them: the keys; the
    kind, as in `Structure.nodes`, or None; the leaf, or NO_LEAF."""
    where = "/".join(path)
    if len(path) > DEEPEST:
        raise ValueError(f"{where[:60]!r}...: expected at most {DEEPEST} keys")
    if isinstance(node, Mapping):
        if not node and path:
            yield path, "dict", NO_LEAF
        for key, child in node.items():
            if not isinstance(key, str):
                raise ValueError(f"{where!r} has the key {key!r}: expected strings")
            yield from _walk(child, (*path, key))
    elif type(node) in (list, tuple):
        yield path, type(node).__name__, NO_LEAF
        for index, child in enumerate(node):
            yield from _walk(child, (*path, str(index)))
    elif node is None:
        yield path, "none", NO_LEAF
    elif isinstance(node, nn.meta.AxisMetadata):
        yield path, _box(node, where), node.value
    elif type(node) in _SCALARS.values():
        yield path, type(node).__name__, node
    else:
        yield path, None, node


def _box(node: nn.meta.AxisMetadata, where: str) -> dict[str, Any]:
    """Returns the kind of a box, with the names of its axes."""
    kind = next((kind for kind, box in _BOXES.items() if type(node) is box), None)
    if kind is None or node.mesh is not None or getattr(node, "rules", None) is not None:
        raise ValueError(
            f"{where!r} is a {type(node).__name__}, which a file can't hold: expected "
            "nn.Partitioned or nn.LogicallyPartitioned without mesh or rules, or unboxed arrays"
        )
    if not hasattr(node.value, "dtype"):
        raise ValueError(f"{where!r} is a box of a {type(node.value).__name__}, not an array")
    return {kind: list(node.names)}


def _stored(leaf: Any, where: str) -> tuple[np.ndarray, str]:
    """Returns an array that safetensors holds, and the dtype that it stands for if another."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(leaf))
        if implementation not in _KEYS:
            raise ValueError(f"{where!r} is a key of {implementation!r}: expected one of {_KEYS}")
        return np.asarray(jax.random.key_data(leaf), order="C"), f"{_KEY}{implementation}"
    array = np.asarray(leaf, order="C")
    name = array.dtype.name
    if name in PLAIN:
        return array.astype(array.dtype.newbyteorder("<"), copy=False), ""
    if name not in _AS_BYTES:
        raise ValueError(f"{where!r} is a {type(leaf).__name__} of {name}: a file can't hold that")
    little = array.astype(np.dtype(_AS_BYTES[name]), copy=False)
    bytes_of = np.frombuffer(little.tobytes(), np.uint8)
    return bytes_of.reshape(*array.shape, array.dtype.itemsize), name


def _restored(array: np.ndarray, dtype: str | None, name: str) -> Any:
    if dtype is not None and dtype.startswith(_KEY):
        implementation = dtype.removeprefix(_KEY)
        if implementation not in _KEYS:
            raise ValueError(f"dtypes: {name!r} is {dtype!r}: expected {_KEY} and one of {_KEYS}")
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=implementation)))
        if array.dtype != np.uint32 or array.shape[-1:] != words.shape:
            raise ValueError(f"{name!r} is no {dtype!r}: {array.dtype} {array.shape}")
        return jax.random.wrap_key_data(jnp.asarray(array), impl=implementation)
    if dtype is not None:
        if dtype not in _AS_BYTES:
            raise ValueError(f"dtypes: {name!r} is {dtype!r}: unknown")
        kind = np.dtype(_AS_BYTES[dtype])
        if array.dtype != np.uint8 or array.shape[-1:] != (kind.itemsize,):
            raise ValueError(f"{name!r} is no {dtype!r}: {array.dtype} {array.shape}")
        array = np.frombuffer(array.tobytes(), kind).reshape(array.shape[:-1])
    # Without 64 bits JAX would round or wrap these; it does so where they are used, and says so.
    if array.dtype.name in _WIDE and not jax.config.jax_enable_x64:
        return array
    return jax.device_put(array)


def _insert(root: dict[str, Any], path: Path, leaf: Any) -> None:
    *parents, last = path
    node = root
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ValueError(f"{'/'.join(path)!r} is inside of an array")
    if last in node:
        raise ValueError(f"{'/'.join(path)!r} is an array and holds others")
    node[last] = leaf


def _convert(root: dict[str, Any], path: Path, kind: Any, name: str) -> None:
    """Makes the dict or array at a path what it was in the tree."""
    if kind in ("dict", "none"):
        _insert(root, path, {} if kind == "dict" else None)
        return
    *parents, last = path
    place: Any = root
    for key in parents:
        place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        if kind not in ("list", "tuple"):
            raise ValueError(f"nodes: there is nothing at {name!r}")
        _insert(root, path, {})
        _convert(root, path, kind, name)
        return
    node = place[last]
    is_array = hasattr(node, "dtype")
    if kind in ("list", "tuple"):
        if not isinstance(node, dict) or set(node) != set(map(str, range(len(node)))):
            raise ValueError(f"nodes: {name!r} is no {kind}")
        items = [node[str(index)] for index in range(len(node))]
        place[last] = items if kind == "list" else tuple(items)
    elif isinstance(kind, str) and kind in _SCALARS:
        if not is_array or node.shape != ():
            raise ValueError(f"nodes: {name!r} is no {kind}")
        place[last] = _SCALARS[kind](node.item())
    elif isinstance(kind, Mapping) and len(kind) == 1 and set(kind) <= set(_BOXES):
        ((box, names),) = kind.items()
        if not is_array or not isinstance(names, list | tuple):
            raise ValueError(f"nodes: {name!r} is no array with names of its axes: {names!r}")
        names = tuple(tuple(n) if isinstance(n, list) else n for n in names)
        place[last] = _BOXES[box](node, names=names)
    else:
        raise ValueError(f"nodes: {name!r} is {str(kind)[:60]!r}: unknown")
