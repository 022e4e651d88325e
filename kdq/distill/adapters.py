"""Trained maps from the student's features to the teacher's width; no part of the student.

An `init_*` function makes the parameters from the shapes of the two features; {} is the identity.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdq.types import Array

Params = dict[str, Array]
Shape = tuple[int, ...]
INIT = jax.nn.initializers.lecun_normal()


def init_linear(key: Array, student: Shape, teacher: Shape) -> Params:
    """A dense layer over the last axis."""
    return {
        "kernel": INIT(key, (student[-1], teacher[-1])),
        "bias": jnp.zeros(teacher[-1]),
    }


def init_conv(key: Array, student: Shape, teacher: Shape) -> Params:
    """A 1×1 convolution; its stride is the ratio of the two maps' sides."""
    maps = len(student) == len(teacher) == 4
    if not maps or any(s % t for s, t in zip(student[1:3], teacher[1:3], strict=True)):
        raise ValueError(
            f"adapter 'conv' goes from maps [batch, h, w, channels] to equal or smaller ones whose "
            f"sides divide theirs; given {student} and {teacher}"
        )
    return init_linear(key, student, teacher)


def init_fit(key: Array, student: Shape, teacher: Shape) -> Params:
    """The one that the shapes ask for: a convolution between maps, else a dense layer."""
    return (init_conv if len(student) == 4 else init_linear)(key, student, teacher)


KINDS: dict[str, Callable[[Array, Shape, Shape], Params]] = {
    "none": lambda key, student, teacher: {},
    "linear": init_linear,
    "conv": init_conv,
    "fit": init_fit,
}


def adapt(params: Params, student: Array, teacher_shape: Shape) -> Array:
    """The student's feature [batch, ..., channels] at the teacher's width (and sides, of maps)."""
    if not params:
        return student
    if student.ndim == 4:
        strides = [s // t for s, t in zip(student.shape[1:3], teacher_shape[1:3], strict=True)]
        student = student[:, :: max(strides[0], 1), :: max(strides[1], 1)]
    return student @ params["kernel"].astype(student.dtype) + params["bias"].astype(student.dtype)
