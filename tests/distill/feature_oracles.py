"""The losses on features from their papers' equations: NumPy, float64, one loop for each index.

`CASES` pairs each with the loss under test, for the tests that all losses share.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from kdq.distill import contrast, features

BATCH = 5


def hint(student, teacher):
    return np.array([np.mean((s - t) ** 2) for s, t in zip(student, teacher, strict=True)])


def attention_transfer(student, teacher, power=2.0):
    def attention(image):
        energy = np.zeros(image.shape[:-1])
        for position in np.ndindex(energy.shape):
            energy[position] = np.mean([abs(a) ** power for a in image[position]])
        length = np.sqrt((energy**2).sum())
        return energy / length if length else energy

    pairs = zip(student, teacher, strict=True)
    return np.array([np.mean((attention(s) - attention(t)) ** 2) for s, t in pairs])


def variational_information(mean, teacher, raw_variance, epsilon=1e-5):
    values = []
    for m, t in zip(mean, teacher, strict=True):
        terms = []
        for index in np.ndindex(m.shape):
            variance = np.log1p(np.exp(raw_variance[index[-1]])) + epsilon
            terms.append((t[index] - m[index]) ** 2 / (2 * variance) + np.log(variance) / 2)
        values.append(np.mean(terms))
    return np.array(values)


def quantized_feature(student, teacher, bits=4):
    reach = np.abs(teacher).max()
    levels = 2 ** (bits - 1) - 1 if teacher.min() < 0 else 2**bits - 1
    scale = reach / levels
    target = np.rint(teacher / scale) * scale
    return hint(student, target)


def similarity_preserving(student, teacher):
    n = len(student)

    def similarities(x):
        gram = np.array([[np.sum(a * b) for b in x] for a in x])
        return np.array([row / np.sqrt((row**2).sum()) for row in gram])

    difference = similarities(student) - similarities(teacher)
    return np.array([sum(d**2 for d in row) / n for row in difference])


def huber(x):
    return x**2 / 2 if abs(x) <= 1 else abs(x) - 1 / 2


def relational_distance(student, teacher):
    n = len(student)

    def distances(x):
        d = np.array([[np.sqrt(np.sum((a - b) ** 2)) for b in x] for a in x])
        pairs = [d[i, j] for i, j in itertools.permutations(range(n), 2)]
        return d / np.mean(pairs) if pairs and np.mean(pairs) else d

    s, t = distances(student), distances(teacher)
    return np.array([sum(huber(s[i, j] - t[i, j]) for j in range(n)) / n for i in range(n)])


def relational_angle(student, teacher):
    n = len(student)

    def cosine(x, i, j, k):
        a, b = (x[j] - x[i]).ravel(), (x[k] - x[i]).ravel()
        lengths = np.sqrt((a @ a) * (b @ b))
        return a @ b / lengths if lengths else 0.0

    values = np.zeros(n)
    for i, j, k in itertools.product(range(n), repeat=3):
        values[i] += huber(cosine(student, i, j, k) - cosine(teacher, i, j, k)) / n**2
    return values


def info_nce(student, teacher, temperature=0.07):
    student, teacher = (x / np.sqrt((x**2).sum(-1, keepdims=True)) for x in (student, teacher))
    values = []
    for i, u in enumerate(student):
        scores = [u @ v / temperature for v in teacher]
        values.append(np.log(np.sum(np.exp(np.array(scores) - scores[i]))))
    return np.array(values)


def contrastive(student, teacher, ids, negatives, *, banks, constants, temperature=0.07, eps=0.0):
    """The equations of the paper; `eps` is what the authors' code adds to k / N."""
    examples, k = len(banks[0]), negatives.shape[1]
    values = np.zeros(len(ids))
    for embedding, bank, z in zip((student, teacher), banks[::-1], constants, strict=True):
        for row, (vector, own, others) in enumerate(zip(embedding, ids, negatives, strict=True)):
            vector = vector / np.sqrt(vector @ vector)
            for index in (own, *others):
                p = np.exp(vector @ bank[index] / temperature) / z
                noise = k / examples
                h = (p if index == own else noise) / (p + noise + eps)
                values[row] -= np.log(h)
    return values


def attention_relation(student_q, student_k, teacher_q, teacher_k, token_mask=None):
    batch, heads, tokens, _ = student_q.shape
    values = np.zeros(batch)
    for b in range(batch):
        kept = [t for t in range(tokens) if token_mask is None or token_mask[b, t]]
        for h, i in itertools.product(range(heads), kept):

            def row(query, key, b=b, h=h, i=i, kept=kept):
                width = query.shape[-1]
                scores = np.array([query[b, h, i] @ key[b, h, j] / np.sqrt(width) for j in kept])
                e = np.exp(scores - scores.max())
                return e / e.sum()

            p, q = row(teacher_q, teacher_k), row(student_q, student_k)
            values[b] += np.sum(p * np.log(p / q)) / (heads * len(kept))
    return values


def hidden_states(student, teacher, token_mask=None):
    values = []
    for b, (s, t) in enumerate(zip(student, teacher, strict=True)):
        kept = [i for i in range(len(s)) if token_mask is None or token_mask[b, i]]
        values.append(np.mean([(s[i] - t[i]) ** 2 for i in kept]) if kept else 0.0)
    return np.array(values)


def numerical_gradient(function: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """Central differences in float64."""
    x, gradient, step = np.array(x, np.float64), np.zeros(x.shape), 1e-6
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + step
        above = function(x)
        x[index] = value - step
        gradient[index] = (above - function(x)) / (2 * step)
        x[index] = value
    return gradient


def close(actual, expected, rtol=1e-5):
    """Within `rtol`, or within `rtol` of the largest element."""
    largest = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol, rtol * largest)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A loss, its oracle, and what its arrays are."""

    loss: Callable  # (*arrays, mask, reduction) -> values
    oracle: Callable  # (*arrays) -> values
    shapes: tuple[tuple[int, ...], ...]  # of the float arrays without the batch
    students: tuple[int, ...] = (0,)  # which of them train
    teachers: tuple[int, ...] = (1,)  # which of them get no gradient
    shared: tuple[np.ndarray, ...] = ()  # further arrays, not of the batch, that train
    integers: tuple[np.ndarray, ...] = ()  # further arrays of the batch
    zero_at_teacher: bool = True  # for a student that equals the teacher
    spread: float = 1.0

    def arrays(self, batch: int = BATCH, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        drawn = [rng.normal(size=(batch, *s)).astype(np.float32) for s in self.shapes]
        for index in self.students:
            drawn[index][0] *= self.spread
        return [*drawn, *(x[:batch] for x in self.integers), *self.shared]

    def rows(self, arrays: list[np.ndarray], kept) -> list[np.ndarray]:
        count = len(self.shapes) + len(self.integers)
        return [x[kept] if i < count else x for i, x in enumerate(arrays)]

    def trained(self) -> tuple[int, ...]:
        start = len(self.shapes) + len(self.integers)
        return (*self.students, *range(start, start + len(self.shared)))


_RNG = np.random.default_rng(7)
EXAMPLES = 12
BANKS = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in _RNG.normal(size=(2, EXAMPLES, 6))]
BANKS = [x.astype(np.float32) for x in BANKS]
CONSTANTS = (250.0, 90.0)
MEMORY = contrast.ContrastiveMemory(
    jnp.asarray(BANKS[0]), jnp.asarray(BANKS[1]), *map(jnp.float32, np.log(CONSTANTS))
)
FRESH_MEMORY = MEMORY.replace(
    student_log_z=jnp.float32(-jnp.inf), teacher_log_z=jnp.float32(-jnp.inf)
)
IDS = np.array([3, 0, 11, 7, 5], np.int32)
NEGATIVES = (IDS[:, None] + _RNG.integers(1, EXAMPLES, size=(5, 4))).astype(np.int32) % EXAMPLES


def _contrastive(student, teacher, ids, negatives, **options):
    return contrast.contrastive(student, teacher, MEMORY, ids, negatives, **options)[0]


def _contrastive_oracle(student, teacher, ids, negatives):
    banks = [x.astype(np.float64) for x in BANKS]
    return contrastive(student, teacher, ids, negatives, banks=banks, constants=CONSTANTS)


MAP, HEADS = (2, 3, 4), (2, 3, 4)
CASES = {
    "hint": Case(loss=features.hint, oracle=hint, shapes=(MAP, MAP)),
    "attention_transfer": Case(
        loss=features.attention_transfer, oracle=attention_transfer, shapes=(MAP, (2, 3, 6))
    ),
    "variational_information": Case(
        loss=features.variational_information,
        oracle=variational_information,
        shapes=(MAP, MAP),
        shared=(np.array([-1.0, 0.0, 2.0, 5.0], np.float32),),
        zero_at_teacher=False,
    ),
    "quantized_feature": Case(
        loss=features.quantized_feature,
        oracle=quantized_feature,
        shapes=(MAP, MAP),
        zero_at_teacher=False,
    ),
    "similarity_preserving": Case(
        loss=features.similarity_preserving,
        oracle=similarity_preserving,
        shapes=((2, 2, 2), (3,)),
    ),
    "relational_distance": Case(
        loss=features.relational_distance,
        oracle=relational_distance,
        shapes=((2, 2, 2), (3,)),
        spread=6.0,  # so that some differences are beyond the Huber loss's square
    ),
    "relational_angle": Case(
        loss=features.relational_angle, oracle=relational_angle, shapes=((2, 2, 2), (3,))
    ),
    "info_nce": Case(
        loss=contrast.info_nce,
        oracle=info_nce,
        shapes=((6,), (6,)),
        students=(0, 1),
        teachers=(),
        zero_at_teacher=False,
    ),
    "contrastive": Case(
        loss=_contrastive,
        oracle=_contrastive_oracle,
        shapes=((6,), (6,)),
        students=(0, 1),
        teachers=(),
        integers=(IDS, NEGATIVES),
        zero_at_teacher=False,
    ),
    "attention_relation": Case(
        loss=features.attention_relation,
        oracle=attention_relation,
        shapes=(HEADS, HEADS, (2, 3, 5), (2, 3, 5)),
        students=(0, 1),
        teachers=(2, 3),
    ),
    "hidden_states": Case(
        loss=features.hidden_states, oracle=hidden_states, shapes=((3, 4), (3, 4))
    ),
}
