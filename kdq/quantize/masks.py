"""Which elements of a layer's arrays count: calibration does not see padding."""

from kdq.models import Product
from kdq.quantize.calls import ModuleCall
from kdq.types import Array


def counted(mask: Array | None, x: Array) -> Array | None:
    """Bool of the rank of `x` that broadcasts to it: false at padding; None if all of it counts.

    `mask` is [batch, positions], see `inputs.masked`; `x` [batch, positions, ..., features]. An
    array that has not these axes in front (a pooled one) counts whole.
    """
    if mask is None or x.ndim < 3 or x.shape[:2] != mask.shape:
        return None
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))


def counted_turns(mask: Array | None, x: Array) -> Array | None:
    """`counted` of what a loop over positions sees in all turns: [turns, batch, ...]."""
    return None if mask is None else counted(mask.T, x)


def counted_in_call(mask: Array | None, call: ModuleCall, x: Array, name: str) -> Array | None:
    """`counted` of an operand of a layer, or (`name` is "") of its output.

    Of a product each axis of positions counts, so that of attention's probabilities
    [batch, heads, queries, keys] none of padding is left.
    """
    if mask is None or call.kind is None or not isinstance(call.module, Product):
        return counted(mask, x)
    if x.shape[0] != mask.shape[0]:
        return None
    counts = None
    for axis in _product_axes(call.args[0], name, x, mask.shape[1]):
        shape = [1] * x.ndim
        shape[0], shape[axis] = mask.shape
        along = mask.reshape(shape)
        counts = along if counts is None else counts & along
    return counts


def _product_axes(equation: str, name: str, x: Array, positions: int) -> list[int]:
    """Axes of positions: of that size, and no axis of the batch or of heads, which all terms have.

    Of queries, keys and values that is the first such axis, as features are the last.
    """
    inputs, output = equation.replace(" ", "").split("->")
    terms = dict(zip(("activations", "other"), inputs.split(","), strict=True)) | {"": output}
    shared = set.intersection(*map(set, terms.values()))
    labels = terms[name].replace("...", "")
    places = {label: i - len(labels) for i, label in enumerate(labels)}
    axes = [i % x.ndim for k, i in places.items() if k not in shared and x.shape[i] == positions]
    return axes[:1] if 1 in axes else axes
