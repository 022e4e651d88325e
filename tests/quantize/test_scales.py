"""The trainable scales out of the quantizers, and back into them."""

import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize import replace_scales, scales
from kdq.quantize.grid import from_range


def _qparams():
    return {
        "conv": {
            "weights": from_range(-jnp.arange(1.0, 4.0), jnp.ones(3), 4),
            "activations": from_range(0.0, 6.0, 8, signed=False),
        },
        "block/head": {"weights": from_range(-1.0, 3.0, 3, symmetric=False)},
    }


def _assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_what_scales_takes_out_replace_scales_puts_back():
    qparams = _qparams()
    taken = scales(qparams)
    expected = {
        "conv": {
            "weights": {"scale": np.float32([1, 2, 3]) / 7},
            "activations": {"scale": np.float32(6) / 255},
        },
        "block/head": {"weights": {"scale": np.float32(4) / 7}},
    }
    assert jax.tree.structure(taken) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), taken, expected)
    _assert_equal(replace_scales(qparams, taken), qparams)
    tripled = jax.tree.map(lambda s: 3 * s, taken)
    _assert_equal(scales(replace_scales(qparams, tripled)), tripled)


def test_fixed_scales_are_not_taken_out():
    qparams = _qparams()
    full = scales(qparams)
    without = scales(qparams, fixed=("conv/activations",))
    _assert_equal(without, full | {"conv": {"weights": full["conv"]["weights"]}})
    _assert_equal(replace_scales(qparams, without), qparams)
    # The whole name has to match, and a layer without any scale left is not there.
    _assert_equal(scales(qparams, fixed=("conv", "activations")), full)
    _assert_equal(scales(qparams, fixed=("conv/.*",)), {"block/head": full["block/head"]})
    assert scales(qparams, fixed=(".*/activations", ".*/weights")) == {}


def test_replacing_touches_the_named_scales_alone():
    qparams = _qparams()
    replaced = replace_scales(qparams, {"conv": {"activations": {"scale": jnp.float32(9)}}})
    assert replaced["conv"]["activations"].scale == 9
    expected = _qparams()
    conv = expected["conv"]
    conv["activations"] = conv["activations"].replace(scale=jnp.float32(9))
    _assert_equal(replaced, expected)
    _assert_equal(qparams, _qparams())  # the argument is not written to
    _assert_equal(replace_scales(qparams, {}), qparams)
