"""A layer as matrix products: `patches @ matrix`, one for each of its groups.

What GPTQ, AWQ and the rescaling of channels need to know of a layer is where its inputs, its
outputs and its groups are in the weight, and only that stands here, a function a kind. `along`,
`scaled` and `reach` take arrays of JAX and of NumPy alike.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize.kinds import Unsupported
from kdq.quantize.layers import LayerInfo
from kdq.quantize.paths import at_path, copied
from kdq.types import Array, Variables

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """Where the axes of a matrix product are in a weight, and in the input."""

    split: tuple[int, ...]  # the weight's shape, the outputs of groups as two axes
    groups: Axes  # of split: one product for each
    inputs: Axes  # of split: summed over
    outputs: Axes  # of split
    channels: Axes  # of split: those of groups and inputs that the input has, in its order
    input_axes: Axes  # of the input: the same

    def size(self, axes: Axes) -> int:
        """Elements along some axes of `split`."""
        return math.prod(self.split[axis] for axis in axes)


def form(layer: LayerInfo) -> Form:
    """The form of a layer with a weight. Raises `Unsupported` with the reason."""
    if layer.kind not in FORMS:
        raise Unsupported(f"a {layer.kind} is no matrix product that kdq knows")
    if getattr(layer.module, "mask", None) is not None:
        raise Unsupported("its weight is masked")
    return FORMS[layer.kind](layer.module, layer.weight_shape)


def to_matrix(weight: Array, form: Form) -> Array:
    """The weight of one layer (not of a stack) as [groups, inputs, outputs]."""
    order = (*form.groups, *form.inputs, *form.outputs)
    matrix = weight.reshape(form.split).transpose(order)
    return matrix.reshape(form.size(form.groups), form.size(form.inputs), -1)


def from_matrix(matrix: Array, form: Form, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_matrix`, for a weight of `shape`."""
    order = (*form.groups, *form.inputs, *form.outputs)
    weight = matrix.reshape([form.split[axis] for axis in order])
    return weight.transpose(np.argsort(order)).reshape(shape)


def patches(layer: LayerInfo, x: Array) -> Array:
    """Returns what each row of the matrix is multiplied by: [groups, samples, inputs] float32.

    A convolution's come from the layer itself, channel by channel, with a kernel that has an output
    for each of its taps, so that padding, strides and dilations of any sort are its own.
    """
    layout = form(layer)
    taps = tuple(axis for axis in layout.inputs if axis not in layout.channels)
    rows = jnp.moveaxis(x, layout.input_axes, range(len(layout.input_axes)))
    if taps:
        rows = _taps(layer, layout, rows[..., None])
    # The axes of `split` that the rows have, -1 for their samples; in order, and as they are to be.
    axes = (*layout.channels, -1, *taps)
    ordered = (*layout.groups, -1, *layout.inputs)
    rows = rows.reshape([-1 if axis < 0 else layout.split[axis] for axis in axes])
    rows = rows.transpose([axes.index(axis) for axis in ordered])
    groups, inputs = layout.size(layout.groups), layout.size(layout.inputs)
    return rows.reshape(groups, -1, inputs).astype(jnp.float32)


def _taps(layer: LayerInfo, form: Form, x: Array) -> Array:
    """For each element of the output, the inputs under the kernel: [..., 1] -> [..., taps]."""
    ones = (*form.groups, *form.channels)
    split = [1 if axis in ones else size for axis, size in enumerate(form.split)]
    count = math.prod(split[axis] for axis in form.inputs)
    split[form.outputs[0]] = count
    single = dataclasses.replace(form, split=tuple(split))
    shape = (*split[: len(layer.weight_shape) - 1], -1)
    changed = {"features": count, "use_bias": False, "precision": jax.lax.Precision.HIGHEST}
    if form.groups:
        changed["feature_group_count"] = 1
    kernel = from_matrix(jnp.eye(count)[None], single, shape)
    return layer.module.clone(**changed).apply({"params": {"kernel": kernel}}, x)


def by_channel(x: Array, form: Form) -> Array:
    """A layer's input as [channels, samples]."""
    front = jnp.moveaxis(x, form.input_axes, range(len(form.input_axes)))
    return front.reshape(form.size(form.channels), -1)


def along(values: Array, form: Form, axes: Axes) -> Array:
    """`values`, one for each element of `axes` of `split`, in a shape that broadcasts to it."""
    values = values.reshape([form.split[axis] for axis in axes]).transpose(np.argsort(axes))
    return values.reshape([n if i in axes else 1 for i, n in enumerate(form.split)])


def scaled(weight: Array, form: Form, axes: Axes, factors: Array) -> Array:
    """The weight of one layer times `factors`, one for each element of `axes` of `split`."""
    product = weight.reshape(form.split) * along(factors, form, axes)
    return product.reshape(weight.shape).astype(weight.dtype)


def reach(weight: Array, form: Form, axes: Axes) -> Array:
    """Largest absolute weight for each element of `axes`: [their size]."""
    others = tuple(i for i in range(len(form.split)) if i not in axes)
    largest = abs(weight.reshape(form.split)).max(others)
    return largest.transpose(np.argsort(np.argsort(axes))).reshape(-1)


def over_stack(function: Callable, stack: tuple[int, ...]) -> Callable:
    """`function` of the arrays of one layer, mapped over the leading axes of those of a stack."""
    for _ in stack:
        function = jax.vmap(function)
    return function


@dataclasses.dataclass(frozen=True)
class ByChannel:
    """A watcher (see `observe`): what to keep of a layer's input, channel by channel."""

    layer: LayerInfo
    update: Callable[[Any, Array], Any]  # (state, [channels, samples] float32) -> state

    def __call__(self, state: Any, x: Array, counts: Array | None = None) -> Any:
        return self.update(state, by_channel(x, form(self.layer)).astype(jnp.float32))


def gram(layer: LayerInfo, x: Array) -> Array:
    """Products of the layer's inputs with one another, Σ p pᵀ: [groups, inputs, inputs]."""
    rows = patches(layer, x)
    return jnp.einsum("gsi,gsj->gij", rows, rows, precision=jax.lax.Precision.HIGHEST)


def empty_gram(layer: LayerInfo) -> Array:
    """The Gram matrices of no inputs: [*stack, groups, inputs, inputs] float32."""
    layout = form(layer)
    inputs = layout.size(layout.inputs)
    return jnp.zeros((*layer.stack, layout.size(layout.groups), inputs, inputs), jnp.float32)


def check_finite(seen: Mapping[str, Array], method: str) -> None:
    """Raises ValueError, with the layer, if what was seen of an input is not finite."""
    for path, value in seen.items():
        if not jnp.isfinite(value).all():
            raise ValueError(f"{method} met NaN or infinity in the input of layer {path!r}")


def weight_of(variables: Variables, layer: LayerInfo) -> Array:
    """The weight of a layer, or of a stack."""
    return at_path(variables["params"], layer.path)[layer.weight_name]


def replaced(variables: Variables, path: str, **arrays: Array) -> Variables:
    """A copy of `variables` in which the layer at `path` has these parameters."""
    params = dict(variables["params"])
    copied(params, path, "the changed weights").update(arrays)
    return {**variables, "params": params}


def _dense(module: Any, shape: tuple[int, ...]) -> Form:
    return Form(split=shape, groups=(), inputs=(0,), outputs=(1,), channels=(0,), input_axes=(-1,))


def _dense_general(module: Any, shape: tuple[int, ...]) -> Form:
    batch, axis = _tuple(module.batch_dims), _tuple(module.axis)
    summed = tuple(range(len(batch), len(batch) + len(axis)))
    return Form(
        split=shape,
        groups=tuple(range(len(batch))),
        inputs=summed,
        outputs=tuple(range(len(batch) + len(axis), len(shape))),
        channels=(*range(len(batch)), *summed),
        input_axes=(*batch, *axis),
    )


def _conv(module: Any, shape: tuple[int, ...]) -> Form:
    *taps, inputs, outputs = shape
    groups, rank = module.feature_group_count, len(taps)
    return Form(
        split=(*taps, inputs, groups, outputs // groups),
        groups=(rank + 1,),
        inputs=tuple(range(rank + 1)),
        outputs=(rank + 2,),
        channels=(rank + 1, rank),
        input_axes=(-1,),
    )


def _conv_transpose(module: Any, shape: tuple[int, ...]) -> Form:
    rank = len(shape) - 2
    inputs, outputs = (rank + 1, rank) if module.transpose_kernel else (rank, rank + 1)
    return Form(
        split=shape,
        groups=(),
        inputs=(*range(rank), inputs),
        outputs=(outputs,),
        channels=(inputs,),
        input_axes=(-1,),
    )


def _embed(module: Any, shape: tuple[int, ...]) -> Form:
    """`attend`, the product with the transposed table."""
    return Form(split=shape, groups=(), inputs=(1,), outputs=(0,), channels=(1,), input_axes=(-1,))


def _einsum(module: Any, shape: tuple[int, ...]) -> Form:
    if module.einsum_str is None:
        raise Unsupported("its equation is an argument of each call")
    terms, output = module.einsum_str.replace(" ", "").split("->")
    lhs, kernel = terms.split(",")
    labels = lhs.replace("...", "")
    clean = (
        "..." not in kernel
        and all(len(set(term)) == len(term) for term in (labels, kernel))
        and set(labels) - set(kernel) <= set(output)
        and set(kernel) <= set(labels) | set(output)
    )
    if not clean:
        raise Unsupported(f"{module.einsum_str!r} is no matrix product")
    find = lambda keep: tuple(i for i, label in enumerate(kernel) if keep(label))
    groups = find(lambda c: c in labels and c in output)
    inputs = find(lambda c: c in labels and c not in output)
    after = lhs.split("...")[-1] if "..." in lhs else ""
    position = lambda c: after.index(c) - len(after) if c in after else lhs.index(c)
    return Form(
        split=shape,
        groups=groups,
        inputs=inputs,
        outputs=find(lambda c: c not in labels),
        channels=(*groups, *inputs),
        input_axes=tuple(position(kernel[axis]) for axis in (*groups, *inputs)),
    )


FORMS = {
    "Dense": _dense,
    "DenseGeneral": _dense_general,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Embed": _embed,
}


def _tuple(x: int | Sequence[int]) -> Axes:
    return tuple(x) if isinstance(x, Sequence) else (x,)
