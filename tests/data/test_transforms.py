"""Augmentations against plain loops, and the random numbers against published ones."""

import numpy as np
import pytest

from kdq.data import Cutout, Flip, Normalize, Shift, build_augmentations
from kdq.data.transforms import _mix, random_uniform, transform

IMAGES = np.random.default_rng(0).integers(1, 256, (64, 7, 5, 3), np.uint8)
UNIFORMS = np.random.default_rng(1).random((2, 64))


def test_mix_is_splitmix64():
    # First outputs of SplitMix64 seeded with 0 (Vigna's splitmix64.c): mix(k * gamma).
    gamma = 0x9E3779B97F4A7C15
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_mix(k * gamma % 2**64) for k in (1, 2, 3)] == expected
    array = np.arange(1, 4, dtype=np.uint64) * np.uint64(gamma)
    np.testing.assert_array_equal(_mix(array), np.array(expected, np.uint64))


def test_uniforms_are_uniform_and_independent_across_keys():
    draws = np.stack([random_uniform(key, np.arange(20_000)) for key in ((0, 1), (0, 2), (1, 1))])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.stack([np.histogram(row, 20, (0, 1))[0] for row in draws])
    assert (np.abs(counts - 1000) < 6 * np.sqrt(950)).all()
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.05
    assert abs(np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]) < 0.05


def test_shift_is_pad_and_crop():
    shifted = Shift(2, fill=9)(IMAGES, UNIFORMS)
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=9)
    tops, lefts = np.floor(UNIFORMS * 5).astype(int)
    for n, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        np.testing.assert_array_equal(shifted[n], padded[n, top : top + 7, left : left + 5])
    assert set(tops) == set(lefts) == set(range(5))


def test_flip_mirrors_half_of_the_images():
    original = IMAGES.copy()
    flipped = Flip()(IMAGES, UNIFORMS[:1])
    for n in range(64):
        expected = IMAGES[n, :, ::-1] if UNIFORMS[0, n] < 0.5 else IMAGES[n]
        np.testing.assert_array_equal(flipped[n], expected)
    np.testing.assert_array_equal(IMAGES, original)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_cutout_fills_one_clipped_square(size):
    original = IMAGES.copy()
    result = Cutout(size)(IMAGES, UNIFORMS)
    for n in range(64):
        top, left = int(UNIFORMS[0, n] * 7) - size // 2, int(UNIFORMS[1, n] * 5) - size // 2
        expected = IMAGES[n].copy()
        expected[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        np.testing.assert_array_equal(result[n], expected)
    np.testing.assert_array_equal(IMAGES, original)


def augment(images, positions, *, seed, augmentations):
    batch = {"image": images, "label": positions}
    changed = transform(batch, {"image": augmentations}, positions=positions, seed=seed)
    assert batch["image"] is images
    assert changed["label"] is positions
    return changed["image"]


def test_augment_depends_on_seed_and_position_not_on_the_batch():
    augmentations = (Shift(1), Flip(), Cutout(3))
    positions = np.arange(100, 164)
    whole = augment(IMAGES, positions, seed=3, augmentations=augmentations)
    for n in (0, 17, 63):
        one = augment(IMAGES[n : n + 1], positions[n : n + 1], seed=3, augmentations=augmentations)
        np.testing.assert_array_equal(one[0], whole[n])
    for seed, moved in ((4, positions), (3, positions + 64)):
        other = augment(IMAGES, moved, seed=seed, augmentations=augmentations)
        assert (other != whole).any(axis=(1, 2, 3)).mean() > 0.5


def test_two_of_a_kind_draw_different_numbers():
    twice = augment(IMAGES, np.arange(64), seed=0, augmentations=(Flip(), Flip()))
    assert 10 < (twice != IMAGES).any(axis=(1, 2, 3)).sum() < 54


def test_normalize_by_scalar_and_channel():
    expected = (IMAGES.astype(np.float64) - [1, 2, 3]) / [4, 5, 6]
    result = Normalize([1, 2, 3], [4, 5, 6])(IMAGES)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    np.testing.assert_allclose(Normalize(8.0, 2.0)(IMAGES), (IMAGES - 8.0) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="each of 3 channels"):
        Normalize([1, 2], 1)(IMAGES)
    with pytest.raises(ValueError, match="std must be positive"):
        Normalize(0, 0)


def test_build_augmentations():
    config = [{"name": "shift", "pixels": 2}, {"name": "flip"}, {"name": "cutout", "size": 4}]
    assert build_augmentations(config) == (Shift(2), Flip(), Cutout(4))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "shfit"}, r"augment\[1\]: no augmentation 'shfit'; valid: .*mean 'shift'"),
        ({"pixels": 2}, "no augmentation None"),
        ({"name": "shift"}, r"augment\[1\]\.pixels is missing"),
        ({"name": "shift", "pixel": 2}, r"key in augment\[1\]: 'pixel' .*valid: pixels, fill"),
        ({"name": "shift", "pixels": 0}, r"augment\[1\]\.pixels=0: .* at least 1"),
        ({"name": "shift", "pixels": 1.5}, "pixels=1.5: .* int"),
        ({"name": "cutout", "size": 1, "fill": 256}, "fill=256: .* 0 to 255"),
    ],
)
def test_build_augmentations_errors(entry, message):
    with pytest.raises(ValueError, match=message):
        build_augmentations([{"name": "flip"}, entry])
