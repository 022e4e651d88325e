"""Calibration does not see padding: a padded batch gives what the batch without gives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import quantize
from kdq.quantize import masked, uniform_rules
from kdq.quantize.inputs import as_batches
from kdq.quantize.observe import observe
from kdq.quantize.observers import MSE, AbsMax, Entropy, MinMax, MovingAverage, Percentile
from kdq.quantize.ptq import matrices
from kdq.quantize.ptq.adaround import adaround
from kdq.quantize.ptq.awq import _Watch, awq
from kdq.quantize.ptq.bias_correction import bias_correction
from kdq.quantize.ptq.brecq import brecq
from kdq.quantize.ptq.errors import layer_errors
from kdq.quantize.ptq.gptq import _Hessian, gptq
from kdq.quantize.ptq.reestimate import reestimate
from kdq.quantize.ptq.smooth import smooth
from kdq.quantize.ptq.teacher_guided import teacher_guided

GARBAGE = 1e6
POSITIONS, LONG, FEATURES = 4, 7, 6
RULES = uniform_rules(4, 4)


class Net(nn.Module):
    """Layers of all sorts on [batch, positions, features]: each position goes its way.

    Attention mixes positions of the batch, and leaves out those that `keep` does.
    """

    attends: bool = False

    @nn.compact
    def __call__(self, x, keep=None):
        x = nn.Dense(8, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        if self.attends:
            mask = None if keep is None else keep[:, None, None, :]
            # As many heads as positions, so that sizes alone do not tell them apart.
            x = nn.MultiHeadDotProductAttention(num_heads=POSITIONS)(x, mask=mask)
        x = nn.Dense(8)(nn.LayerNorm()(x))
        return nn.Dense(5)(nn.relu(x))


class Rnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.SimpleCell(5))(x))


def batches_of(padding: str, attends: bool = False, count: int = 4):
    """(batches without padding, the same padded with garbage)."""
    rng, garbage = np.random.default_rng(0), np.random.default_rng(1)
    plain, padded = [], []
    for i in range(count):
        rows = 5 if padding == "rows" and i == count - 1 else 8
        x = np.float32(rng.normal(size=(rows, POSITIONS, FEATURES)))
        length = POSITIONS if padding == "rows" else LONG
        # Of all directions, so that norms let it through.
        whole = np.float32(GARBAGE * garbage.normal(size=(8, length, FEATURES)))
        whole[:rows, :POSITIONS] = x
        mask = np.zeros((8, length), np.float32)
        mask[:rows, :POSITIONS] = 1
        keep = {"keep": mask > 0} if attends else {}
        of_rows = mask[:, 0] if padding == "rows" else mask
        plain.append(x)
        padded.append(masked(quantize.Inputs(whole, **keep), of_rows))
    return plain, padded


def close(got, expected, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, expected)


PADDING = pytest.mark.parametrize("padding", ["rows", "positions"])


def variables_of(model, x):
    return model.init(jax.random.key(1), x)


@PADDING
@pytest.mark.parametrize(
    ("observer", "attends"),
    [
        (MinMax(), True),
        (AbsMax(), False),
        (MovingAverage(), False),
        (Percentile(99.0), False),
        (MSE(candidates=10), False),
        (Entropy(candidates=10), False),
    ],
)
def test_quantizers_are_those_of_the_batches_without_padding(padding, attends, observer):
    model = Net(attends)
    plain, padded = batches_of(padding, attends)
    variables = variables_of(model, plain[0])
    rules = uniform_rules(4, 4, observer=observer)
    expected = quantize.calibrate(model, variables, rules, plain)
    close(quantize.calibrate(model, variables, rules, padded), expected)


@PADDING
def test_quantizers_in_a_loop_over_positions(padding):
    plain, padded = batches_of(padding)
    variables = variables_of(Rnn(), plain[0])
    expected = quantize.calibrate(Rnn(), variables, RULES, plain)
    close(quantize.calibrate(Rnn(), variables, RULES, padded), expected)


@PADDING
@pytest.mark.parametrize("kind", ["hessian", "means"])
def test_hessians_and_channel_means(padding, kind):
    plain, padded = batches_of(padding)
    variables = variables_of(Net(), plain[0])
    layer = quantize.list_layers(Net(), variables, plain[0])["Dense_1"]
    key, gram = ("Dense_1", "activations"), matrices.empty_gram(layer)
    watcher, state = _Hessian(layer), (gram, None)
    if kind == "means":
        watcher, state = _Watch(layer), (jnp.zeros(8), jnp.zeros(()), gram)
    see = lambda batches: observe(Net(), variables, {}, {key: watcher}, {key: state}, batches)
    close(see(padded), see(plain), 1e-5)


@PADDING
@pytest.mark.parametrize(
    "method", [gptq, awq, smooth, bias_correction, reestimate, adaround, brecq, teacher_guided]
)
def test_methods_change_weights_as_without_padding(padding, method):
    plain, padded = batches_of(padding)
    variables = variables_of(Net(), plain[0])
    before = method in (awq, smooth)
    qparams = {} if before else quantize.calibrate(Net(), variables, RULES, plain)
    options = {}
    if method in (adaround, brecq):
        options = {"steps": 20, "batch_size": 16}
    if method is brecq:
        options["blocks"], options["fisher"] = ["Dense_.*"], True
    if method is teacher_guided:
        options = {"scale_steps": 5, "rounding_steps": 10}
    expected = method(Net(), variables, qparams, plain, **options)
    # Adam's first steps divide gradients by themselves: those near 0 keep few of their digits.
    rtol = 1e-3 if method is teacher_guided else 1e-4
    close(method(Net(), variables, qparams, padded, **options), expected, rtol)


@PADDING
def test_errors_that_are_reported(padding):
    plain, padded = batches_of(padding)
    variables = variables_of(Net(), plain[0])
    qparams = quantize.calibrate(Net(), variables, RULES, plain)
    pair = variables, qparams
    errors = [layer_errors(Net(), variables, pair, pair, b) for b in (padded, plain)]
    close(*((dict(error.sqnr), error.kl) for error in errors), 1e-5)
    tables = [quantize.sqnr(Net(), variables, qparams, b) for b in (padded, plain)]
    assert str(tables[0]) == str(tables[1])


def test_a_mask_that_hides_nothing_leaves_the_batch_as_it_is():
    x = np.ones((2, 3, 4), np.float32)
    (inputs,) = as_batches([masked(x, np.ones(2))], "test")
    assert inputs.mask is None
    assert inputs.batch.shape == x.shape
    (inputs,) = as_batches([masked(x, np.array([[1, 1, 0], [0, 0, 0]]))], "test")
    assert inputs.batch.shape == (1, 3, 4)
    assert inputs.mask.tolist() == [[True, True, False]]


def test_masks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"mask has shape \(3,\).*a batch of 2"):
        masked(np.ones((2, 3)), np.ones(3))
    with pytest.raises(ValueError, match="batch 0 is empty"):
        list(as_batches([masked(np.ones((2, 3)), np.zeros(2))], "test"))
