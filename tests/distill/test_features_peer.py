"""The losses on features against torchdistill's, which runs in float64.

Where the peer leaves its paper, the test says so and compares with what is left.
"""

import jax
import numpy as np
import pytest
from feature_oracles import CASES, EXAMPLES, FRESH_MEMORY, IDS, NEGATIVES, close

from kdq.distill import contrast, features

pytest.importorskip("torchdistill")
torch = pytest.importorskip("torch")
mid_level = pytest.importorskip("torchdistill.losses.mid_level")


def _tensor(x):
    """In torch's order of axes."""
    x = np.moveaxis(x, -1, 1) if x.ndim == 4 else x
    return torch.tensor(x.astype(np.float64), requires_grad=True)


def _array(tensor):
    x = tensor.detach().numpy()
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def _theirs(loss, student, teacher):
    """Value, and gradient to the student, of a loss of the peer on outputs of a layer "x"."""
    student, teacher = _tensor(student), _tensor(teacher)
    value = loss({"x": {"output": student}}, {"x": {"output": teacher}}, None)
    value.backward()
    return value.item(), _array(student.grad)


def _ours(loss, student, teacher):
    return jax.jit(jax.value_and_grad(lambda s: loss(s, teacher, reduction="mean")))(student)


def _compare(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    assert np.abs(theirs[1]).max() > 1e-4
    close(ours[1], theirs[1])


def _pair():
    return {"only": {side: {"io": "output", "path": "x"} for side in ("student", "teacher")}}


def test_hint():
    arrays = CASES["hint"].arrays()
    at = {"module_path": "x", "io": "output"}
    peer = mid_level.SimpleLossWrapper(
        torch.nn.MSELoss(),
        input={**at, "is_from_teacher": False},
        target={**at, "is_from_teacher": True},
    )
    _compare(_ours(features.hint, *arrays), _theirs(peer, *arrays))


def test_attention_transfer_as_in_the_authors_code():
    arrays = CASES["attention_transfer"].arrays()
    peer = mid_level.ATLoss(_pair(), mode="code")
    _compare(_ours(features.attention_transfer, *arrays), _theirs(peer, *arrays))


def test_attention_transfer_as_in_the_paper_is_the_root_of_ours():
    # The paper's equation has the norm where the authors' code has the mean of squares.
    arrays = CASES["attention_transfer"].arrays()
    positions = np.prod(arrays[0].shape[1:-1])
    values = jax.jit(features.attention_transfer)(*arrays)
    theirs, _ = _theirs(mid_level.ATLoss(_pair(), mode="paper"), *arrays)
    np.testing.assert_allclose(np.mean(np.sqrt(positions * values)), theirs, rtol=1e-5)


def test_similarity_preserving():
    arrays = CASES["similarity_preserving"].arrays()
    ours = _ours(features.similarity_preserving, *arrays)

    def normalized_by(p):
        class Peer(mid_level.SPKDLoss):
            def matmul_and_normalize(self, z):
                z = torch.flatten(z, 1)
                return torch.nn.functional.normalize(z @ z.T, p=p, dim=1)

        return Peer("x", "x", "batchmean")

    # The paper divides each row by its L2 norm. The peer means to, but hands the 1 of its axis to
    # `normalize` as the p of the norm, and so divides by the L1 norm. All else is the same.
    peer = _theirs(mid_level.SPKDLoss("x", "x", "batchmean"), *arrays)
    np.testing.assert_allclose(peer[0], _theirs(normalized_by(1), *arrays)[0], rtol=1e-12)
    assert abs(peer[0] / ours[0] - 1) > 0.1
    _compare(ours, _theirs(normalized_by(2), *arrays))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize(
    ("name", "factors"), [("relational_distance", (1, 0)), ("relational_angle", (0, 1))]
)
def test_relational(name, factors, chunk):
    # Peer and authors' code divide by n² and n³, zeros of the diagonal included, as we do.
    arrays = CASES[name].arrays()
    loss = lambda s, t, **options: CASES[name].loss(s, t, chunk, **options)
    _compare(_ours(loss, *arrays), _theirs(mid_level.RKDLoss("x", "x", *factors, "mean"), *arrays))


def test_relational_distance_of_coinciding_examples():
    # They count in the mean distance of either; the peer has 1e-6 in place of their 0.
    student, teacher = CASES["relational_distance"].arrays()
    student[1] = student[4]
    peer, _ = _theirs(mid_level.RKDLoss("x", "x", 1, 0, "mean"), student, teacher)
    ours, _ = _ours(features.relational_distance, student, teacher)
    np.testing.assert_allclose(ours, peer, rtol=1e-5)


def test_variational_information():
    mean, teacher, raw = CASES["variational_information"].arrays()
    tensors = [_tensor(x) for x in (mean, teacher)]
    raw_tensor = torch.tensor(raw.astype(np.float64), requires_grad=True)
    variance = torch.nn.functional.softplus(raw_tensor)[:, None, None] + 1e-5
    peer = mid_level.VIDLoss(_pair())
    value = peer({"x": {"output": (tensors[0], variance)}}, {"x": {"output": tensors[1]}})
    value.backward()
    loss = lambda mean, raw: features.variational_information(mean, teacher, raw, reduction="mean")
    ours, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(mean, raw)
    _compare((ours, gradients[0]), (value.item(), _array(tensors[0].grad)))
    close(gradients[1], raw_tensor.grad.numpy())


@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_contrastive_for_two_steps(eps):
    # eps is what the authors, and so the peer, add to k / N; the paper has nothing there.
    dim = 6
    peer = mid_level.CRDLoss("n", "e", "n", dim, EXAMPLES, NEGATIVES.shape[1], EXAMPLES, eps=eps)
    peer = peer.double()
    peer.params[1], peer.params[4] = 0.07, 0.5  # they were rounded to float32
    memory = FRESH_MEMORY
    for mine, bank in ((peer.memory_v1, "student_bank"), (peer.memory_v2, "teacher_bank")):
        mine.copy_(torch.tensor(np.asarray(getattr(memory, bank), np.float64)))
    indices = {
        "pos_idx": torch.tensor(IDS, dtype=torch.int64),
        "contrast_idx": torch.tensor(np.c_[IDS, NEGATIVES], dtype=torch.int64),
    }

    @jax.jit
    def ours(memory, *embeddings):
        def loss(*embeddings):
            return contrast.contrastive(*embeddings, memory, IDS, NEGATIVES, reduction="mean")

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(*embeddings)

    for seed in range(2):
        embeddings = CASES["contrastive"].arrays(seed=seed)[:2]
        tensors = [_tensor(x) for x in embeddings]
        # The peer leaves the scaling to length 1 to the layer before.
        student, teacher = (torch.nn.functional.normalize(x) for x in tensors)
        outputs = {"n": {"output": student}, "e": {"input": indices}}
        theirs = peer(outputs, {"n": {"output": teacher}})
        theirs.sum().backward()
        (value, memory), gradients = ours(memory, *embeddings)
        for gradient, tensor in zip(gradients, tensors, strict=True):
            _compare((value, gradient), (theirs.item(), tensor.grad.numpy()))
    log_z = [memory.student_log_z, memory.teacher_log_z]
    np.testing.assert_allclose(np.exp(log_z), _array(peer.params[2:4]), rtol=1e-5)
    np.testing.assert_allclose(memory.student_bank, _array(peer.memory_v1), atol=1e-6)
    np.testing.assert_allclose(memory.teacher_bank, _array(peer.memory_v2), atol=1e-6)
