"""Layers in nested dicts of variables, by their paths."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn


def path_of(module: nn.Module) -> str:
    """A bound module's path, joined by "/"."""
    return "/".join(module.path)


def keys_of_layer(tree: Any, path: str) -> tuple[str, ...] | None:
    """Returns the keys that lead to a "/"-joined path in nested dicts, or None.

    A key may hold "/" itself, as of `nn.Dense(name="a/b")`.
    """
    if not path:
        return ()
    for key in tree if isinstance(tree, Mapping) else ():
        if key == path:
            return (key,)
        if path.startswith(f"{key}/"):
            rest = keys_of_layer(tree[key], path.removeprefix(f"{key}/"))
            if rest is not None:
                return (key, *rest)
    return None


def at_path(tree: Any, path: str) -> Any:
    """The subtree of a nested dict at a "/"-joined path. Raises KeyError."""
    keys = keys_of_layer(tree, path)
    if keys is None:
        raise KeyError(path)
    for key in keys:
        tree = tree[key]
    return tree


def copied(params: dict[str, Any], path: str, whose: str) -> dict[str, Any]:
    """The dict of a layer in `params`, itself and every dict on the way replaced by a copy.

    The last may be new, and empty: a product of activations has no parameters of its own.
    """
    keys = keys_of_layer(params, path)
    if keys is None:
        parent, _, last = path.rpartition("/")
        parents = keys_of_layer(params, parent)
        if parents is None:
            raise unknown_layer(whose, path, params)
        keys = (*parents, last)
    layer = params
    for name in keys:  # none of them: the model is the layer
        layer[name] = dict(layer.get(name, {}))
        layer = layer[name]
    return layer


def unknown_layer(whose: str, path: str, params: Any) -> KeyError:
    """The error for a path that is no layer: it says how far the path goes, and what is there."""
    parents, layer = [], params
    for name in path.split("/"):
        if name not in layer:
            break
        parents.append(name)
        layer = layer[name]
    return KeyError(
        f"{whose} name layer {path!r}, which the params do not have: "
        f"at {'/'.join(parents) or 'the top'} there is {sorted(layer)}"
    )


def has_path(params: Any, path: str) -> bool:
    """Returns whether there is something at a "/"-joined path."""
    return keys_of_layer(params, path) is not None
