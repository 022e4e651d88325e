"""The losses on logits in float64 NumPy, one example at a time, from the papers."""

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax, softmax


def logits(shape: tuple[int, ...] = (6, 10), spread: float = 3.0) -> list[np.ndarray]:
    """The student's and the teacher's, float32."""
    rng = np.random.default_rng(0)
    return [(spread * rng.normal(size=shape)).astype(np.float32) for _ in range(2)]


def probabilities(student, teacher, temperature) -> list[np.ndarray]:
    """(q, p) in float64."""
    scaled = (np.asarray(v, np.float64) / temperature for v in (student, teacher))
    return [softmax(v, axis=-1) for v in scaled]


def each(of_one: Callable) -> Callable:
    """An oracle of one example as one of a batch; `labels` is the only option with rows."""

    def of_batch(student, teacher, labels=None, **options):
        rows = range(len(student))
        given = [{} if labels is None else {"label": labels[i]} for i in rows]
        return np.array([of_one(student[i], teacher[i], **given[i], **options) for i in rows])

    return of_batch


def central_differences(f: Callable, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    slopes = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[i] = step
        slopes[i] = (f(x + nudge) - f(x - nudge)) / (2 * step)
    return slopes


def entropy(p, q):
    """scipy.stats.entropy, which takes ten times as long."""
    p, q = np.asarray(p) / np.sum(p), np.asarray(q) / np.sum(q)
    return np.sum(p * np.log(p / q))


def kl(s, t, temperature):
    q, p = probabilities(s, t, temperature)
    return temperature**2 * entropy(p, q)


def reverse_kl(s, t, temperature):
    q, p = probabilities(s, t, temperature)
    return temperature**2 * entropy(q, p)


def jensen_shannon(s, t, temperature, beta):
    q, p = probabilities(s, t, temperature)
    m = beta * p + (1 - beta) * q
    return temperature**2 * (beta * entropy(p, m) + (1 - beta) * entropy(q, m))


def skew_kl(s, t, temperature, alpha):
    q, p = probabilities(s, t, temperature)
    return temperature**2 * entropy(p, alpha * p + (1 - alpha) * q)


def dkd(s, t, label, temperature, alpha, beta):
    q, p = probabilities(s, t, temperature)
    tckd = entropy([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    # entropy() divides by the sum: what is left are the probabilities among the other classes.
    nckd = entropy(np.delete(p, label), np.delete(q, label))
    return temperature**2 * (alpha * tckd + beta * nckd)


def dist(s, t, temperature, beta, gamma):
    """Of the whole batch; one example has no correlation between examples."""
    q, p = probabilities(s, t, temperature)
    # corrcoef of all rows of both; what is left of it are the pairs of the same row.
    inter = 1 - np.diag(np.corrcoef(q, p)[: len(q), len(q) :])
    intra = (
        np.mean(1 - np.diag(np.corrcoef(q.T, p.T)[: q.shape[1], q.shape[1] :]))
        if len(q) > 1
        else 0.0
    )
    return temperature**2 * (beta * inter + gamma * intra)


def standardized_kl(s, t, temperature):
    q, p = (softmax((v - v.mean()) / v.std() / temperature) for v in (s, t))
    return temperature**2 * entropy(p, q)


def soft_mse(s, t):
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def hard_label(s, t):
    return -log_softmax(s)[max(range(len(t)), key=lambda c: t[c])]


def cross_entropy(s, t, label, label_smoothing):
    del t
    target = np.full(len(s), label_smoothing / len(s))
    target[label] += 1 - label_smoothing
    return -target @ log_softmax(s)
