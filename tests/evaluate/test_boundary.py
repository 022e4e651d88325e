"""Agreement near the boundary for linear classifiers, where the answer is known."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.evaluate import boundary


def _affine(weights, bias):
    weights, bias = np.float32(weights), np.float32(bias)
    return lambda images: images.reshape(len(images), -1) @ weights + bias


def _threshold(at):
    """Of images of one pixel: class 1 above the threshold."""
    return _affine([[0.0, 1.0]], [0.0, -at])


def _column(values):
    return np.asarray(values, np.float32)[:, None]


def _on_paths(student, teacher, *args, **options):
    return boundary.probe_paths(teacher, *args, **options).agreement(student)


def _after_steps(student, teacher, images, epsilon, batch_size=256):
    """Agreement after a step against either model."""
    moved = {
        name: boundary.adversarial_images(fn, images, epsilon, batch_size)
        for name, fn in (("against_teacher", teacher), ("against_student", student))
    }
    return {
        name: boundary.probe_images(teacher, images, batch_size).agreement(student)
        for name, images in moved.items()
    }


def test_pairs_are_of_different_classes_and_each_is_as_likely():
    classes = np.array([2, 0, 0, 5, 2, 0])
    pairs = boundary.draw_pairs(classes, 22_000, seed=3)
    assert (classes[pairs[:, 0]] != classes[pairs[:, 1]]).all()
    count = collections.Counter(map(tuple, pairs.tolist()))
    assert len(count) == 6 * 5 - 3 * 2 - 2 * 1  # all ordered pairs but those within a class
    # 1000 expected of each of 22, with a standard deviation of 31.
    assert all(850 < n < 1150 for n in count.values())


def test_a_seed_decides_the_pairs():
    classes = np.arange(20) % 3
    pairs = boundary.draw_pairs(classes, 30, seed=1)
    np.testing.assert_array_equal(pairs, boundary.draw_pairs(classes, 30, seed=1))
    assert (pairs != boundary.draw_pairs(classes, 30, seed=2)).any()


@pytest.mark.parametrize(
    ("shift", "agree"), [(0.0, 9), (0.2, 8), (0.5, 7), (-0.5, 6), (0.9, 5), (3.0, 5)]
)
def test_paths_from_minus_one_to_one_between_two_thresholds(shift, agree):
    # Points at -0.8, -0.6, …, 0.8: those between the teacher's threshold at 0.05, and the
    # student's at 0.05 + shift, are disputed.
    points = np.arange(-4, 5) / 5
    low, high = sorted([0.05, 0.05 + shift])
    assert np.sum((points < low) | (points > high)) == agree
    images = _column([-1.0, 1.0, -1.0, 1.0, 1.0])
    value = _on_paths(_threshold(0.05 + shift), _threshold(0.05), images, pairs=4)
    assert value == pytest.approx(agree / 9)


def test_the_ends_are_no_points():
    # The student is wrong at the ends only: |x| ≥ 1.
    def student(images):
        flipped = jnp.where(jnp.abs(images) > 0.99, -images, images)
        return _threshold(0.05)(flipped)

    images = _column([-1.0, 1.0])
    for points in (1, 4, 30):
        value = _on_paths(student, _threshold(0.05), images, points=points)
        assert value == 1


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_paths_in_the_plane_by_the_crossings_of_two_lines(batch_size):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 2, 1, 1)).astype(np.float32)
    student, teacher = np.array([1.0, -0.4]), np.array([0.3, 1.0])
    flat = images.reshape(40, 2).astype(np.float64)
    pairs = boundary.draw_pairs((flat @ teacher - 0.2 > 0).astype(int), 25, seed=4)
    agree = 0
    for i, j in pairs:
        for k in range(1, 6):
            point = flat[i] + k / 6 * (flat[j] - flat[i])
            agree += (point @ student + 0.1 > 0) == (point @ teacher - 0.2 > 0)
    shapes = []

    def counted(images):
        shapes.append(images.shape)
        return _affine(np.stack([0 * teacher, teacher], axis=1), [0, -0.2])(images)

    value = _on_paths(
        _affine(np.stack([0 * student, student], axis=1), [0, 0.1]),
        counted,
        images,
        pairs=25,
        seed=4,
        points=5,
        batch_size=batch_size,
    )
    assert value == pytest.approx(agree / 125)
    assert 0.2 < value < 0.95
    assert len(shapes) == 1  # both passes and their last batches are of one shape


def test_one_teachers_probes_serve_any_student_and_one_program_all_their_weights():
    traced = []

    def counted(at, images):
        traced.append(1)
        return jnp.concatenate([0 * images, images - at], axis=1)

    images = _column([-1.0, 1.0, -1.0, 1.0, 1.0])
    paths = boundary.probe_paths(_threshold(0.05), images, pairs=4)
    # The thresholds of the test above, and the points that are not disputed.
    for at, agree in ((0.05, 9), (0.25, 8), (-0.45, 6)):
        student = jax.tree_util.Partial(counted, np.float32(at))
        assert paths.agreement(student) == pytest.approx(agree / 9)
        assert len(traced) == 1
    few = boundary.probe_images(_threshold(0.05), _column([-0.4, 0.0, 0.1, 0.2]))
    assert few.agreement(_threshold(0.15)) == 0.75
    assert few.agreement(_threshold(-9.0)) == 0.5
    assert few.agreement(_threshold(np.nan)) == 0


def _fgsm_expected(attacked, student, teacher, images, epsilon):
    """By hand: the loss of a two-class linear model grows against the sign of its own score."""
    agree = []
    for x in images.astype(np.float64):
        score = x @ attacked[0] + attacked[1]
        moved = x - epsilon * np.sign(attacked[0]) * (1 if score > 0 else -1)
        scores = [moved @ w + b for w, b in (student, teacher)]
        assert min(abs(s) for s in scores) > 1e-4
        agree.append((scores[0] > 0) == (scores[1] > 0))
    return np.mean(agree)


def test_adversarial_images_of_a_linear_model():
    # Two classes: every pixel moves against its weight where class 1 is predicted, else with it.
    fn = _affine([[0.0, 2.0], [0.0, -3.0], [0.0, 0.0]], [0.0, 0.0])
    images = np.array([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0]], np.float32)
    for batch_size in (1, 256):
        moved = boundary.adversarial_images(fn, images, 0.25, batch_size)
        np.testing.assert_allclose(moved - images, [[-0.25, 0.25, 0], [0.25, -0.25, 0]])


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("batch_size", [16, 256])
def test_fgsm_of_linear_models_in_closed_form(epsilon, batch_size):
    images = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    student, teacher = ([1.0, -0.5, 0.2], 0.1), ([0.4, -1.5, -0.6], -0.3)
    student, teacher = ((np.array(w), b) for w, b in (student, teacher))
    shapes = []

    def counted(images):
        shapes.append(images.shape)
        w, b = teacher
        return _affine(np.stack([0 * w, w], axis=1), [0, b])(images)

    w, b = student
    result = _after_steps(
        _affine(np.stack([0 * w, w], axis=1), [0, b]), counted, images, epsilon, batch_size
    )
    assert result == pytest.approx(
        {
            "against_teacher": _fgsm_expected(teacher, student, teacher, images, epsilon),
            "against_student": _fgsm_expected(student, student, teacher, images, epsilon),
        }
    )
    assert len(set(shapes)) == 1
    if epsilon:
        assert result["against_teacher"] != result["against_student"]


def test_the_step_follows_the_loss_of_many_classes():
    # The gradient of the cross-entropy is Σ_c (p_c − y_c) w_c, in float64.
    rng = np.random.default_rng(5)
    images = rng.normal(size=(60, 4)).astype(np.float32)
    models = 1.5 * rng.normal(size=(2, 4, 5)).astype(np.float32)
    flat = images.astype(np.float64)
    expected = []
    for weights in models[::-1]:  # the teacher's first
        logits = flat @ weights
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        gradient = (p - np.eye(5)[logits.argmax(-1)]) @ weights.T
        moved = flat + 0.4 * np.sign(gradient)
        expected.append(np.mean(np.equal(*((moved @ w).argmax(-1) for w in models))))
    student, teacher = (_affine(w, 0.0) for w in models)
    result = _after_steps(student, teacher, images, 0.4)
    assert [result["against_teacher"], result["against_student"]] == pytest.approx(expected)
    clean = _after_steps(student, teacher, images, 0.0)
    assert clean["against_teacher"] == clean["against_student"] != result["against_teacher"]


def test_a_certain_model_is_attacked_too():
    # In float32 its softmax is exactly 1, and the gradient of its loss exactly 0.
    certain = _affine([[0.0, 1e3]], [0.0, 0.0])
    images = _column([-0.5, 0.5])
    student = _threshold(-10.0)  # always class 1
    result = _after_steps(student, certain, images, 1.0)
    # The teacher says 0, 1; the step takes it to 1, 0: it still agrees with the student once.
    assert result["against_teacher"] == 0.5
    only_low = _after_steps(student, certain, images[:1], 1.0)
    assert only_low == {"against_teacher": 1.0, "against_student": 0.0}


def test_a_diverged_student_agrees_nowhere_and_a_diverged_teacher_is_refused():
    images, sound = _column([-1.0, 1.0]), _threshold(0.05)

    def diverged(images):
        return sound(images) * jnp.nan

    assert _on_paths(diverged, sound, images) == 0
    result = _after_steps(diverged, sound, images, 0.1)
    assert result == {"against_teacher": 0, "against_student": 0}
    with pytest.raises(ValueError, match="predicts nothing"):
        _on_paths(sound, diverged, images)
    with pytest.raises(ValueError, match="predicts nothing"):
        _after_steps(sound, diverged, images, 0.1)


def test_what_has_no_boundary_is_refused():
    images, fn = _column([-1.0, 1.0]), _threshold(0.05)
    three = _affine(np.zeros((1, 3)), 0.0)
    for measure in (
        _on_paths,
        lambda *args: _after_steps(*args, 0.1),
    ):
        with pytest.raises(ValueError, match=r"given \(2, 3\) and \(2, 2\)"):
            measure(three, fn, images)
        with pytest.raises(ValueError, match="must be floats"):
            measure(fn, fn, images.astype(np.int32))
        one = _affine([[1.0]], 0.0)
        with pytest.raises(ValueError, match="at least 2, given"):
            measure(one, one, images)
        with pytest.raises(ValueError, match="lengths must be equal and positive"):
            measure(fn, fn, images[:0])
    with pytest.raises(ValueError, match="all examples are of one class"):
        _on_paths(fn, fn, images[:1])
    with pytest.raises(ValueError, match="0 pairs"):
        _on_paths(fn, fn, images, pairs=0)
    with pytest.raises(ValueError, match="points must be at least 1, given 0"):
        _on_paths(fn, fn, images, points=0)
    for epsilon in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"epsilon must be in \[0, inf\)"):
            _after_steps(fn, fn, images, epsilon)
