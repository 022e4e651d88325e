"""Energy, modelled by hand, and counters that are read right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kdq import quantize
from kdq.deploy.measure import energy
from kdq.quantize import QuantizationRule, TensorSpec


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="b")(nn.Dense(30, name="a")(x))


@pytest.fixture(scope="module")
def case():
    model, x = Two(), jnp.ones((2, 20))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    return model, variables, x, quantize.list_layers(model, variables, x)


def test_a_float_model_by_hand(case):
    found = energy.modelled(case[-1], {})
    # 20 * 30 products, 600 weights of 32 bits in 8 KiB, 50 numbers of 32 bits.
    assert found["a"].arithmetic == pytest.approx(600 * (3.7 + 0.9) / 1000)
    assert found["a"].weights == pytest.approx(600 * 32 / 64 * 10 / 1000)
    assert found["a"].activations == pytest.approx(50 * 32 / 64 * 10 / 1000)
    assert found["b"].total == pytest.approx((150 * 4.6 + 150 * 5 + 35 * 5) / 1000)


def test_integers_by_hand(case):
    model, variables, x, layers = case
    rules = (
        QuantizationRule(path="a", weights=TensorSpec(bits=4), activations=TensorSpec(bits=8)),
        QuantizationRule(path="b", weights=TensorSpec(bits=2)),  # its input stays float
    )
    qparams = quantize.calibrate(model, variables, rules, [x])
    found = energy.modelled(layers, qparams)
    multiply = 0.0029948 * 32 + 0.0010417 * 6
    assert found["a"].arithmetic == pytest.approx(600 * (multiply + 0.1) / 1000)
    assert found["a"].weights == pytest.approx(600 * 4 / 64 * 10 / 1000)
    assert found["a"].activations == pytest.approx(50 * 8 / 64 * 10 / 1000)
    assert found["b"].arithmetic == pytest.approx(150 * 4.6 / 1000)
    assert found["b"].weights == pytest.approx(150 * 2 / 64 * 10 / 1000)


def test_the_fits_meet_the_published_numbers():
    """Horowitz, figure 1.1.9: additions of 0.03 and 0.1 pJ, products of 0.2 and 3.1 pJ."""
    assert energy.integer_add(8) == pytest.approx(0.03, rel=0.2)
    assert energy.integer_add(32) == pytest.approx(0.1)
    assert energy.integer_multiply(8, 8) == pytest.approx(0.2, rel=0.02)
    assert energy.integer_multiply(32, 32) == pytest.approx(3.1, rel=0.01)


@pytest.mark.parametrize(("features", "read"), [(100, 20.0), (1000, 100.0), (30_000, 1300.0)])
def test_large_weights_come_from_larger_memories(features, read):
    model, x = nn.Dense(features, name="dense"), jnp.ones((1, 50))
    layers = quantize.list_layers(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    (found,) = energy.modelled(layers, {}).values()
    assert found.weights == pytest.approx(50 * features * 32 / 64 * read / 1000)


def _counter(root, name, value, limit=1_000_000):
    zone = root / name
    zone.mkdir(exist_ok=True)
    (zone / "energy_uj").write_text(f"{value}\n")
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")


def test_counters_are_summed_and_may_start_again(tmp_path):
    _counter(tmp_path, "intel-rapl:0", 999_000)
    _counter(tmp_path, "intel-rapl:1", 5_000)
    _counter(tmp_path, "intel-rapl:0:0", 1)  # a part of the first

    def call():
        _counter(tmp_path, "intel-rapl:0", 2_000)  # past its limit
        _counter(tmp_path, "intel-rapl:1", 9_000)
        _counter(tmp_path, "intel-rapl:0:0", 500_000)

    found = energy.measured(call, seconds=0, root=tmp_path)
    assert found == {"joules": pytest.approx(0.003 + 0.004), "calls": 1, "source": "RAPL"}


def test_without_a_counter_nothing_is_made_up(tmp_path):
    assert energy.measured(lambda: None, seconds=0, root=tmp_path) is None
