"""The streaming evaluation: equal to one over the whole split, in bounded memory; saved scores."""

import math
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations

from kdq.evaluate.run import Scores, compare, evaluate, outputs_of
from kdq.files import DamagedError
from kdq.quantize.network import Network, Weights
from kdq.tasks import build

CLASSIFICATION = build("classification")


class Linear(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.features)(x)


def _weights(seed, features, inputs=4):
    kernel = np.random.default_rng(seed).normal(size=(inputs, features)).astype(np.float32)
    params = {"Dense_0": {"kernel": kernel, "bias": np.zeros(features, np.float32)}}
    return Weights(variables={"params": params}, qparams={})


def _batches(data, size):
    """Batches of one size; the last one is padded with copies of the first example."""
    n = len(data["image"])
    for start in range(0, n, size):
        index = np.arange(start, start + size)
        inside = index < n
        index = np.where(inside, index, 0)
        batch = {name: values[index] for name, values in data.items()}
        yield {**batch, "mask": inside.astype(np.float32)}


LABELS = {
    "classification": lambda rng: rng.integers(0, 6, 10).astype(np.int32),
    "multilabel": lambda rng: rng.integers(0, 2, (10, 6)).astype(np.float32),
    "regression": lambda rng: rng.normal(size=(10, 6)).astype(np.float32),
}


def _data(name, seed=0):
    rng = np.random.default_rng(seed)
    return {"image": rng.normal(size=(10, 4)).astype(np.float32), "label": LABELS[name](rng)}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("size", [4, 5, 16])
def test_it_is_the_evaluation_of_the_whole_split_whatever_the_batch_size(name, size):
    task, data = build(name), _data(name)
    student, teacher = _weights(1, 6), _weights(2, 6)
    ask = outputs_of(Linear(6), teacher, task)
    scores = evaluate(Linear(6), student, task, _batches(data, size), ask)
    outputs, reference = (
        data["image"] @ w.variables["params"]["Dense_0"]["kernel"] for w in (student, teacher)
    )
    whole = {**task.scores(outputs, data), **task.divergence(outputs, reference)}
    assert scores.arrays.keys() == whole.keys()
    for key, value in whole.items():
        assert scores.arrays[key].dtype == np.float32
        np.testing.assert_allclose(scores.arrays[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    np.testing.assert_array_equal(scores.examples, np.arange(10))
    metrics = (*task.metrics, *task.fidelity)
    expected = {m.name: m.compute(whole) for m in metrics}
    assert scores.values(*metrics) == pytest.approx(expected, rel=1e-4)


def test_ids_name_the_examples_and_positions_of_one_share_it():
    data = {
        "image": np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32),
        "label": np.random.default_rng(1).integers(0, 3, (3, 5)),
        "token_mask": np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]),
        "id": np.array([30, 10, 20]),
    }
    scores = evaluate(Linear(3), _weights(0, 3), CLASSIFICATION, _batches(data, 2))
    assert scores.examples.tolist() == [30] * 2 + [10] * 5 + [20]
    whole = CLASSIFICATION.scores(
        data["image"] @ _weights(0, 3).variables["params"]["Dense_0"]["kernel"], data
    )
    counted = data["token_mask"] > 0
    np.testing.assert_allclose(scores.arrays["nll"], whole["nll"][counted], rtol=1e-5)
    # A mean over tokens, not a mean over texts of their means.
    expected = np.mean(np.asarray(whole["nll"], np.float64)[counted])
    assert scores.values(CLASSIFICATION.metrics[1])["nll"] == pytest.approx(expected, rel=1e-6)


def test_a_task_may_tell_documents_apart_within_a_row():
    class Packed(type(CLASSIFICATION)):
        def examples(self, batch):
            return batch["document"]

    data = {
        "image": np.zeros((2, 3, 4), np.float32),
        "label": np.zeros((2, 3), np.int32),
        "token_mask": np.array([[1, 1, 1], [1, 1, 0]]),
        "document": np.array([[7, 7, 8], [8, 9, 0]]),
    }
    scores = evaluate(Linear(3), _weights(0, 3), Packed(), _batches(data, 2))
    assert scores.examples.tolist() == [7, 7, 8, 8, 9]


def test_one_function_is_compiled_for_all_batches_and_weights():
    data = _data("classification")
    run = lambda seed: evaluate(
        Network(Linear(6)), _weights(seed, 6), CLASSIFICATION, _batches(data, 5)
    )
    run(0)
    with count_compilations("_score") as compiled:
        run(1)
    assert compiled == []


def test_what_is_kept_does_not_grow_with_the_classes():
    """Fails for an evaluation that keeps outputs: those of the split are 32 MB, a batch's 1 MB."""
    classes, batches = 4096, 32
    image = np.ones((64, 1), np.float32)
    split = [{"image": image, "label": np.zeros(64, np.int32)}] * batches
    weights = _weights(0, classes, inputs=1)
    ask = outputs_of(Linear(classes), weights, CLASSIFICATION)
    evaluate(Linear(classes), weights, CLASSIFICATION, split[:1], ask)  # compiles
    alive = []

    def stream():
        for batch in split:
            alive.append(sum(a.nbytes for a in jax.live_arrays() if classes in a.shape))
            yield batch

    tracemalloc.start()
    scores = evaluate(Linear(classes), weights, CLASSIFICATION, stream(), ask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = sum(a.nbytes for a in scores.arrays.values()) + scores.examples.nbytes
    assert kept <= len(scores) * (4 * len(scores.arrays) + 8)
    assert len(scores.arrays) < 16
    outputs = 4 * classes * 64
    assert peak < 4 * outputs  # on the host
    assert max(alive) - alive[0] <= 2 * outputs  # on the device: of the batch before, a teacher's


def test_no_examples_is_an_error():
    masked = [{**batch, "mask": batch["mask"] * 0} for batch in _batches(_data("regression"), 4)]
    for batches in ([], masked):
        with pytest.raises(ValueError, match="no prediction that is not masked"):
            evaluate(Linear(6), _weights(0, 6), build("regression"), batches)


@pytest.fixture(scope="module")
def scores():
    batches = _batches(_data("multilabel"), 5)
    return evaluate(Linear(6), _weights(0, 6), build("multilabel"), batches)


def test_scores_are_read_as_they_were_written(scores, tmp_path):
    path = tmp_path / "scores.npz"
    assert scores.save(path) == path.stat().st_size
    data = path.read_bytes()
    scores.save(path)
    assert path.read_bytes() == data  # the same bytes at any time
    read = Scores.load(path)
    assert read.arrays.keys() == scores.arrays.keys()
    for name, value in scores.arrays.items():
        np.testing.assert_array_equal(read.arrays[name], value)
    np.testing.assert_array_equal(read.examples, scores.examples)


def test_scores_are_compressed(tmp_path):
    right = np.random.default_rng(0).random(10_000) < 0.9
    scores = Scores(arrays={"correct": right.astype(np.float32)}, examples=np.arange(10_000))
    assert scores.save(tmp_path / "scores.npz") < 25_000  # of 120,000


def test_damaged_scores_are_refused(scores, tmp_path):
    path = tmp_path / "scores.npz"
    scores.save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    changed = [bytearray(data) for _ in range(300)]
    for copy in changed:
        copy[rng.integers(len(copy))] ^= 1 << rng.integers(8)
    refused = []
    for copy in [*changed, b"", b"nothing", data[:-30], data[: len(data) // 2]]:
        path.write_bytes(copy)
        try:
            read = Scores.load(path)
        except DamagedError as error:
            refused.append(str(error))
            continue
        # A bit of a date or of another field that says nothing of the contents.
        for name, value in scores.arrays.items():
            np.testing.assert_array_equal(read.arrays[name], value)
    assert len(refused) > 200
    assert all(str(path) in line and "\n" not in line for line in refused)
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "nowhere")


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "scores.npz"
    Scores(arrays={"nll": np.zeros(10**6, np.float32)}, examples=np.arange(10**6)).save(path)
    monkeypatch.setattr("kdq.evaluate.run._MOST_BYTES", 2**20)
    monkeypatch.setattr("kdq.evaluate.run._MOST_RATIO", 1)
    with pytest.raises(DamagedError, match="bytes would unpack to 120"):
        Scores.load(path)


def _arm(correct):
    return Scores(arrays={"correct": np.asarray(correct, np.float32)}, examples=np.arange(4))


def test_arms_are_compared_over_seeds_and_over_examples():
    accuracy = CLASSIFICATION.primary
    arms = {0: _arm([1, 1, 1, 0]), 1: _arm([1, 1, 1, 1])}
    others = {0: _arm([1, 0, 1, 0]), 1: _arm([1, 0, 1, 1])}
    seeds, both = compare(accuracy, arms, others)
    assert (seeds.mean, both.mean) == (25, 25)
    # The seeds agree on 25 points. Whether another test split does is another question.
    assert (seeds.low, seeds.high) == (25, 25)
    assert both.low < 0 < both.high
    assert both.over == "seeds and examples"
    _, single = compare(accuracy, {0: arms[0]}, {0: others[0]})
    assert (single.n, single.over) == (1, "examples")
    with pytest.raises(ValueError, match="seeds differ"):
        compare(accuracy, arms, {0: others[0]})
    moved = Scores(arrays=others[1].arrays, examples=np.arange(1, 5))
    with pytest.raises(ValueError, match="different predictions"):
        compare(accuracy, arms, {0: others[0], 1: moved})


def test_a_relative_difference_is_that_of_the_means():
    task = build("regression")
    error = np.random.default_rng(0).exponential(size=(4, 6, 1)).astype(np.float32)
    make = lambda e: Scores(arrays={"squared_error": e}, examples=np.arange(6))
    arms = {0: make(error[0]), 1: make(error[1])}
    others = {0: make(error[2]), 1: make(error[3])}
    seeds, both = compare(task.primary, arms, others)
    rmse = np.sqrt(error.astype(np.float64).mean((1, 2)))
    expected = np.mean(100 * (rmse[:2] / rmse[2:] - 1))
    assert seeds.mean == pytest.approx(expected)
    assert both.mean == pytest.approx(expected)
    assert not math.isnan(both.low)


def test_a_reference_may_be_anything_that_has_outputs():
    data = _data("classification")
    data["teacher_logits"] = np.zeros((10, 6), np.float32)
    ask = lambda batch: jnp.asarray(batch["teacher_logits"])
    scores = evaluate(Linear(6), _weights(0, 6), CLASSIFICATION, _batches(data, 4), ask)
    assert scores.arrays["signal"].tolist() == [0] * 10
    np.testing.assert_array_equal(scores.arrays["agreement"], scores.arrays["predicted"] == 0)
