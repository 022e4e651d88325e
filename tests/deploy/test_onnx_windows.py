"""Windows, padding and convolutions in ONNX Runtime against NumPy, written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import deploy
from kdq.deploy.flow.layer import inline
from kdq.deploy.formats.onnx import model as onnx_model
from kdq.deploy.formats.onnx import program as onnx_program

pytest.importorskip("jax2onnx")

STEPS = {jax.lax.max: np.maximum, jax.lax.min: np.minimum, jax.lax.add: np.add}
STEPS[jax.lax.mul] = np.multiply


def _run(function, x):
    """What ONNX Runtime computes, of a batch of any size."""
    (batch,) = jax.export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    program = inline(jax.make_jaxpr(function)(spec), [spec], unroll=True)
    proto = onnx_model.convert(program, opset=21)
    session = deploy.onnx_session(proto.SerializeToString())
    return [n.op_type for n in proto.graph.node], session.run(
        None, {session.get_inputs()[0].name: x}
    )[0]


def _padded(x, config, fill):
    """As `jax.lax.pad`, an element at a time."""
    for axis, (low, high, interior) in enumerate(config):
        rows = np.moveaxis(x, axis, 0)
        wide = np.full(((len(rows) - 1) * (interior + 1) + 1, *rows.shape[1:]), fill, x.dtype)
        wide[:: interior + 1] = rows
        ends = [np.full((max(n, 0), *rows.shape[1:]), fill, x.dtype) for n in (low, high)]
        wide = np.concatenate([ends[0], wide, ends[1]])
        wide = wide[max(-low, 0) : len(wide) - max(-high, 0)]
        x = np.moveaxis(wide, 0, axis)
    return x


def _windowed(x, init, step, size, strides, padding, base, dilation):
    """As `jax.lax.reduce_window`, a window at a time."""
    pairs = zip(padding, base, strict=True)
    x = _padded(x, [(low, high, by - 1) for (low, high), by in pairs], init)
    reach = [(n - 1) * by + 1 for n, by in zip(size, dilation, strict=True)]
    starts = [range(0, n - r + 1, s) for n, r, s in zip(x.shape, reach, strides, strict=True)]
    out = np.empty([len(of) for of in starts], x.dtype)
    for place in np.ndindex(out.shape):
        window = tuple(
            slice(of[i], of[i] + r, by)
            for of, i, r, by in zip(starts, place, reach, dilation, strict=True)
        )
        out[place] = step.reduce(x[window].ravel(), initial=np.asarray(init, x.dtype))
    return out


NHWC = (1, 3, 2, 1)
WINDOWS = {  # size, strides, padding, base dilation, window dilation, of [3, 7, 6, 2]
    "valid": (NHWC, (1, 2, 2, 1), ((0, 0),) * 4, (1,) * 4, (1,) * 4),
    "padded": (NHWC, (1, 2, 1, 1), ((0, 0), (1, 2), (1, 0), (0, 0)), (1,) * 4, (1,) * 4),
    "padded by a window": (NHWC, (1,) * 4, ((0, 0), (3, 4), (0, 2), (0, 0)), (1,) * 4, (1,) * 4),
    "cropped": (NHWC, (1,) * 4, ((0, 0), (-1, 2), (1, -2), (0, 0)), (1,) * 4, (1,) * 4),
    "dilated": (NHWC, (1, 2, 1, 1), ((0, 0), (1, 1), (0, 1), (0, 0)), (1,) * 4, (1, 2, 3, 1)),
    "spread": (NHWC, (1, 1, 2, 1), ((0, 0), (0, 1), (1, 0), (0, 0)), (1, 2, 3, 1), (1,) * 4),
    "of channels": ((1, 1, 2, 2), (1, 2, 1, 1), ((0, 0),) * 4, (1,) * 4, (1,) * 4),
    "of three axes": ((1, 3, 2, 2), (1,) * 4, ((0, 0), (1, 0), (0, 0), (0, 0)), (1,) * 4, (1,) * 4),
    "nothing": ((1,) * 4, (1,) * 4, ((0, 0),) * 4, (1,) * 4, (1,) * 4),
}  # fmt: skip
DTYPES = (np.float32, np.uint8, np.int8, np.int32)


def _draw(shape, dtype):
    rng = np.random.default_rng(0)
    if dtype == np.float32:
        return rng.normal(size=shape).astype(dtype)
    limits = np.iinfo(np.int16 if dtype == np.int32 else dtype)
    return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)


def _identity(step, dtype):
    if step in (jax.lax.add, jax.lax.mul):
        return dtype(step is jax.lax.mul)
    if dtype == np.float32:
        return np.float32(-np.inf if step is jax.lax.max else np.inf)
    limits = np.iinfo(dtype)
    return dtype(limits.min if step is jax.lax.max else limits.max)


def _check_window(x, init, step, *window):
    reduce = lambda x: jax.lax.reduce_window(x, jnp.asarray(init), step, *window)
    operators, outputs = _run(reduce, x)
    with np.errstate(over="ignore"):
        expected = _windowed(x, init, STEPS[step], *window)
    assert outputs.dtype == x.dtype
    if step in (jax.lax.add, jax.lax.mul):
        np.testing.assert_allclose(outputs, expected, rtol=2e-6, atol=2e-6)
    else:
        np.testing.assert_array_equal(outputs, expected)
    return operators


slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
DEFAULT = [(jax.lax.max, np.uint8), (jax.lax.max, np.float32)]
REDUCTIONS = [*itertools.product((jax.lax.max, jax.lax.min), DTYPES)]
REDUCTIONS += [(jax.lax.add, np.float32), (jax.lax.add, np.int32), (jax.lax.mul, np.float32)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("step", "dtype"), [case if case in DEFAULT else slow(*case) for case in REDUCTIONS]
)
def test_windows_from_the_identity(step, dtype, window):
    x = _draw((3, 7, 6, 2), dtype)
    operators = _check_window(x, _identity(step, dtype), step, *WINDOWS[window])
    # What ONNX Runtime has a kernel for is that kernel.
    if window in ("valid", "padded", "dilated") and step is jax.lax.max and dtype != np.int32:
        assert operators.count("MaxPool") == 1
        assert not {"Slice", "Pad"} & {*operators}


@pytest.mark.parametrize("step", [jax.lax.max, jax.lax.min, jax.lax.add])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_windows_from_another_value(step, dtype):
    """It is what is padded with, and is part of each window."""
    x = _draw((3, 7, 6, 2), dtype)
    init = dtype(0.25) if dtype == np.float32 else dtype(200)
    _check_window(x, init, step, *WINDOWS["padded"])


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_windows_over_any_number_of_axes(rank):
    x = _draw((2, *(5, 4, 3, 4)[:rank], 2), np.uint8)
    ones = (1,) * (rank + 2)
    padding = ((0, 0), *[(1, 0)] * rank, (0, 0))
    window = ((1, *[2] * rank, 1), (1, *[2] * rank, 1), padding, ones, ones)
    operators = _check_window(x, np.uint8(0), jax.lax.max, *window)
    assert ("MaxPool" in operators) == (rank <= 3)


def test_a_window_over_the_batch_is_refused():
    x, ones = _draw((4, 3), np.float32), (1, 1)
    pool = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 1), ones, "VALID")
    with pytest.raises(onnx_program.NoForm, match="a window over the examples of a batch"):
        _run(pool, x)


def test_a_window_of_another_reduction_is_refused():
    x = _draw((4, 3), np.float32)
    step = lambda a, b: a * 0.5 + b
    pool = lambda x: jax.lax.reduce_window(x, 0.0, step, (1, 2), (1, 1), "VALID")
    with pytest.raises(onnx_program.NoForm, match=r"windows of max, min, add, mul"):
        _run(pool, x)


@pytest.mark.parametrize(
    "config",
    [
        ((0, 0, 0), (1, 2, 0), (0, 3, 0)),
        ((0, 0, 0), (-1, 2, 0), (3, -2, 0)),
        ((0, 0, 0), (0, 0, 1), (1, -1, 2)),
        ((0, 0, 0), (-2, -1, 1), (0, 0, 0)),
        ((1, 2, 0), (0, 0, 0), (0, 0, 0)),
        ((0, 0, 0), (0, 0, 0), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [*DTYPES, np.bool_, np.float16])
def test_padding(config, dtype):
    x = np.arange(30).reshape(2, 5, 3).astype(dtype)
    fill = dtype(1)
    outputs = _run(lambda x: jax.lax.pad(x, jnp.asarray(fill), config), x)[1]
    assert outputs.dtype == dtype
    np.testing.assert_array_equal(outputs, _padded(x, config, fill))


def test_nothing_is_put_between_examples():
    x = _draw((2, 3), np.float32)
    with pytest.raises(onnx_program.NoForm, match="between the examples of a batch"):
        _run(lambda x: jax.lax.pad(x, 0.0, ((0, 0, 1), (0, 0, 0))), x)


def _convolved(x, w, strides, padding, lhs_dilation, rhs_dilation, groups):
    """Of [N, *spatial, C] and [*spatial, C/groups, O], an output at a time, in float64."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    config = [
        (0, 0, 0),
        *((*pair, by - 1) for pair, by in zip(padding, lhs_dilation, strict=True)),
        (0, 0, 0),
    ]
    x = _padded(x, config, 0.0)
    sizes = w.shape[:-2]
    reach = [(n - 1) * by + 1 for n, by in zip(sizes, rhs_dilation, strict=True)]
    starts = [range(0, n - r + 1, s) for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    depth, width = w.shape[-2], w.shape[-1] // groups
    out = np.empty((len(x), *map(len, starts), w.shape[-1]))
    for place in np.ndindex(*map(len, starts)):
        window = tuple(
            slice(of[i], of[i] + r, by)
            for of, i, r, by in zip(starts, place, reach, rhs_dilation, strict=True)
        )
        for group in range(groups):
            part = x[(slice(None), *window, slice(group * depth, (group + 1) * depth))]
            kernel = w[..., group * width : (group + 1) * width]
            out[(slice(None), *place, slice(group * width, (group + 1) * width))] = part.reshape(
                len(x), -1
            ) @ kernel.reshape(-1, width)
    return out


@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (3, {}),
        (3, {"strides": (2, 1, 2), "padding": ((1, 0), (0, 1), (1, 1))}),
        (3, {"groups": 2, "rhs_dilation": (1, 2, 1), "padding": ((1, 1),) * 3}),
        (3, {"lhs_dilation": (2, 1, 2), "padding": ((1, 0), (1, 1), (0, 1))}),
        (2, {"lhs_dilation": (2, 2), "strides": (3, 1), "padding": ((2, 1), (1, 1))}),
        (2, {"padding": ((-1, 1), (2, -1))}),
        (2, {"lhs_dilation": (3, 2), "padding": ((-1, 1), (2, 0)), "groups": 2}),
        (1, {"padding": ((3, 0),), "rhs_dilation": (2,)}),
    ],
)
def test_convolutions_of_floats(rank, options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *(6, 5, 4)[:rank], 4)).astype(np.float32)
    groups, ones = options.get("groups", 1), (1,) * rank
    w = rng.normal(size=(*(2, 3, 2)[:rank], 4 // groups, 6)).astype(np.float32)
    spatial = "DHW"[:rank]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    names = ("strides", "padding", "lhs_dilation", "rhs_dilation")
    defaults = (ones, ((0, 0),) * rank, ones, ones)
    window = [options.get(name, value) for name, value in zip(names, defaults, strict=True)]
    convolve = lambda x: jax.lax.conv_general_dilated(
        x, w, *window, dimension_numbers=numbers, feature_group_count=groups
    )
    expected = _convolved(x, w, *window, groups)
    np.testing.assert_allclose(_run(convolve, x)[1], expected, atol=1e-5)


def test_parts_of_a_concatenation_may_be_empty():
    x = _draw((2, 3, 2), np.float32)
    outputs = _run(lambda x: jnp.concatenate([x[:, :0], x, x[:, 3:]], axis=1), x)[1]
    np.testing.assert_array_equal(outputs, x)


def test_limits_and_remainders():
    x = 3 * _draw((3, 4), np.float32)
    limited = _run(lambda x: jax.lax.clamp(-1.0, x, jnp.full(x.shape, 2.0)), x)[1]
    np.testing.assert_array_equal(limited, np.clip(x, -1, 2))
    np.testing.assert_array_equal(_run(lambda x: jax.lax.rem(x, x * 0 + 2), x)[1], np.fmod(x, 2))
    whole = x.astype(np.int32)
    remainder = _run(lambda x: jax.lax.rem(x, x * 0 + 2), whole)[1]
    np.testing.assert_array_equal(remainder, np.fmod(whole, 2))


@pytest.mark.parametrize("axis", [1, 2])
def test_an_element_of_each_example(axis):
    x = _draw((3, 4, 4, 2), np.float32)
    at = lambda x, numpy: (numpy.abs(x[:, 0, 0, 0]) * 20).astype(np.int32) % 4 - 1
    last = lambda x, of, numpy: (
        x[numpy.arange(x.shape[0]), of] if axis == 1 else x[numpy.arange(x.shape[0]), :, of]
    )
    outputs = _run(lambda x: last(x, at(x, jnp), jnp), x)[1]
    assert len(set(at(x, np))) > 1
    np.testing.assert_array_equal(outputs, last(x, at(x, np), np))
