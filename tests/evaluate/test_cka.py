"""Linear CKA against the centred kernels of its definition, and what it does not see."""

import math

import numpy as np
import pytest
from scipy.stats import ortho_group

from kdq.evaluate import cka


def _definition(x, y):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with tr(K H L H), H = I - 11'/n."""
    n = len(x)
    x, y = x.reshape(n, -1), y.reshape(n, -1)
    h = np.eye(n) - np.ones((n, n)) / n
    k, m = x @ x.T, y @ y.T

    def hsic(a, b):
        return np.trace(a @ h @ b @ h)

    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def _linear_cka(x, y):
    return cka.layer_cka({"x": x}, {"y": y})["x", "y"]


def _features(n, dx, dy, shared=2, seed=0):
    """Two sets of features with a few factors in common, far from the origin."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, shared))
    x = z @ rng.normal(size=(shared, dx)) + rng.normal(size=(n, dx)) + 3
    y = z @ rng.normal(size=(shared, dy)) + rng.normal(size=(n, dy)) - 5
    return x, y


# Features, kernels, one of each for the norms, and more rows than a block holds.
@pytest.mark.parametrize(("n", "dx", "dy"), [(60, 5, 8), (12, 40, 50), (20, 300, 4), (300, 700, 9)])
def test_equals_the_definition_by_kernels(n, dx, dy):
    x, y = _features(n, dx, dy)
    expected = _definition(x, y)
    assert 0.05 < expected < 0.99
    assert _linear_cka(x, y) == pytest.approx(expected, rel=1e-10)
    assert _linear_cka(y, x) == pytest.approx(expected, rel=1e-10)


def test_wide_features_of_many_examples_go_through_kernels_block_by_block():
    x, y = _features(300, 700, 650)
    assert 700 * 650 > 300 * (700 + 650)
    assert _linear_cka(x, y) == pytest.approx(_definition(x, y), rel=1e-10)


def test_sees_no_rotation_scale_or_shift_but_other_linear_maps():
    rng = np.random.default_rng(1)
    x, y = _features(50, 6, 6)
    value = _linear_cka(x, y)
    rotation = ortho_group.rvs(6, random_state=rng)
    assert _linear_cka(x @ rotation * 0.01 + 7, y) == pytest.approx(value, rel=1e-9)
    assert _linear_cka(x, x @ rotation * 30 - 2) == pytest.approx(1, rel=1e-9)
    assert abs(_linear_cka(x * np.logspace(-1, 1, 6), y) - value) > 0.05


def test_of_one_feature_it_is_the_squared_correlation():
    x, y = _features(30, 1, 1)
    expected = np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2
    assert _linear_cka(x, y) == pytest.approx(expected)


def test_images_of_features_are_flattened_or_averaged():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(15, 3, 3, 4)), rng.normal(size=(15, 2, 2, 5))
    assert _linear_cka(x, y) == pytest.approx(_definition(x, y))
    averaged = cka.layer_cka({"a": x}, {"b": y}, cka.global_average)["a", "b"]
    means = [np.array([[v[..., c].mean() for c in range(v.shape[-1])] for v in f]) for f in (x, y)]
    assert averaged == pytest.approx(_definition(*means))
    assert averaged != pytest.approx(_linear_cka(x, y), rel=0.01)
    np.testing.assert_allclose(cka.global_average(means[0]), means[0])  # dense: nothing to average


def _layers(n=40):
    rng = np.random.default_rng(3)
    x, y = _features(n, 6, 9)
    student = {"conv": rng.normal(size=(n, 2, 2, 3)) + x[:, None, None, :3], "dense": x}
    teacher = {"early": y[:, :4], "late": y[:, None, :] + rng.normal(size=(n, 4, 9))}
    return student, teacher


def test_every_layer_with_every_layer_in_order():
    student, teacher = _layers()
    result = cka.layer_cka(student, teacher)
    names = [("conv", "early"), ("conv", "late"), ("dense", "early"), ("dense", "late")]
    assert list(result) == names
    expected = [_definition(student[s], teacher[t]) for s, t in names]
    assert list(result.values()) == pytest.approx(expected)
    assert len({round(v, 3) for v in expected}) == 4


@pytest.mark.parametrize("reduce", [cka.flatten, cka.global_average])
def test_maps_are_reduced_as_is_said(reduce):
    student, teacher = _layers()
    expected = {
        (s, t): _definition(reduce(student[s]), reduce(teacher[t]))
        for s in student
        for t in teacher
    }
    assert cka.layer_cka(student, teacher, reduce) == pytest.approx(expected, rel=1e-10)


def test_a_mean_a_million_times_the_spread_costs_few_digits():
    x, y = _features(50, 4, 5)
    expected = _definition(x, y)
    assert _linear_cka(x + 1e6, y - 1e6) == pytest.approx(expected, rel=1e-7)


def test_constant_features_and_nans_have_no_cka():
    x, _ = _features(10, 3, 3)
    constant = np.full((10, 2), 0.1)  # whose mean of ten is not 0.1
    assert math.isnan(_linear_cka(x, constant))
    broken = x.copy()
    broken[4, 1] = np.nan
    assert math.isnan(_linear_cka(x, broken))


def test_what_has_no_cka_is_refused():
    x, y = _features(10, 3, 4)
    with pytest.raises(ValueError, match=r"same examples .*'student x': 9, 'teacher y': 10"):
        _linear_cka(x[:9], y)
    with pytest.raises(ValueError, match="at least 2 examples"):
        _linear_cka(x[:1], y[:1])
    with pytest.raises(ValueError, match=r"axis of features: \(10,\)"):
        _linear_cka(x[:, 0], y)
    with pytest.raises(ValueError, match="needs layers of both"):
        cka.layer_cka({}, {"y": y})
