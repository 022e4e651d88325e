"""Masks and reductions, as every distillation loss has them."""

import jax.numpy as jnp

from kdq.types import Array

_REDUCTIONS = ("none", "mean", "sum")


def reduce(values: Array, mask: Array | None, reduction: str) -> Array:
    """Masked values of a batch, as they are or as one number.

    A masked value counts as 0 even if it is inf or NaN. Its gradient is only finite if the loss
    never saw the masked example, which is what `hide` is for.

    Args:
      values: [batch...] float.
      mask: [batch...], 1 for the examples that count and 0 for the others, any dtype; None counts
        all.
      reduction: "none" returns [batch...], "sum" the sum of the values that count, "mean" this sum
        divided by their number (by 1 if there are none).

    Returns:
      [batch...] or a scalar, in the dtype of `values`.

    Raises:
      ValueError: another reduction, or a mask of another shape.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, given {reduction!r}")
    count = values.size
    if mask is not None:
        check_mask(mask, values.shape)
        mask = mask.astype(values.dtype)
        values = mask * jnp.where(mask > 0, values, 0)
        count = jnp.sum(mask)
    if reduction == "none":
        return values
    total = jnp.sum(values)
    return total if reduction == "sum" else total / jnp.maximum(count, 1)


def hide(examples: Array, mask: Array | None) -> Array:
    """The examples with zeros in place of the masked ones, so that no gradient flows to these.

    Zeros, not a factor of 0: a masked example may hold inf or NaN.

    Args:
      examples: [batch..., features...] of any dtype.
      mask: [batch...] of 0 and 1, or None.

    Returns:
      The same shape and dtype.

    Raises:
      ValueError: a mask whose shape is no leading part of the shape of `examples`.
    """
    if mask is None:
        return examples
    check_mask(mask, examples.shape[: mask.ndim])
    return jnp.where(mask.reshape(mask.shape + (1,) * (examples.ndim - mask.ndim)) > 0, examples, 0)


def check_mask(mask: Array, batch_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the mask has one entry for each example: shapes never broadcast."""
    if mask.shape != batch_shape:
        raise ValueError(f"mask must have the batch's shape {batch_shape}, given {mask.shape}")
