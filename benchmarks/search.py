"""Times evaluations of policies, and what searchers take beside them: the digits student.

python benchmarks/search.py [--seconds=20] [--model=cnn|resnet] [--out=FILE]

Calibration-only rewards on one batch of held-out examples, one policy a call and several at once in
turns; compilations are counted. Then each searcher on the same scores, of which the evaluations'
own time is taken off. The student is untrained: what they find says nothing here.
"""

import time

import jax
import numpy as np
from absl import flags
from interleaved import publish, run, show

from kdq import models, quantize, tasks
from kdq.search import bank, evaluate, measured, sensitivity, spaces
from kdq.search.searchers import METHODS, make

SECONDS = flags.DEFINE_float("seconds", 20.0, "Of evaluating, each way.")
MODEL = flags.DEFINE_enum("model", "cnn", ["cnn", "resnet"], "Digits' student, or Fashion-MNIST's.")
EVALUATIONS = flags.DEFINE_integer("evaluations", 200, "Of each searcher.")
OUT = flags.DEFINE_string("out", None, "JSON file for the figures.")

CONFIGS = {
    "cnn": ({"name": "cnn", "num_classes": 10, "widths": (8, 16, 16, 16)}, (360, 8, 8, 1)),
    "resnet": (
        {
            "name": "resnet",
            "num_classes": 10,
            "depth": 8,
            "stem_pool": True,
            "widths": (8, 8, 16, 32),
        },
        (1000, 28, 28, 1),
    ),
}
CHOICES = ("W2A8", "W3A8", "W4A8", "W6A8", "W8A8")
AT_ONCE = 8


def main(_: list[str]) -> None:
    config, shape = CONFIGS[MODEL.value]
    evaluator, layers = _evaluator(config, shape)
    before = evaluate._evaluate._cache_size()
    figures = {"policies_a_minute": _rates(evaluator)}
    figures["compilations"] = evaluate._evaluate._cache_size() - before
    show("policies a minute", figures["policies_a_minute"])
    figures["searchers"] = _searchers(config, shape, evaluator, layers)
    publish(figures, OUT.value, model=config, examples=shape[0], choices=CHOICES)


def _evaluator(config, shape):
    rng = np.random.default_rng(0)
    images = rng.normal(size=shape).astype(np.float32)
    model = models.build(**config)
    variables = quantize.as_network(model).init(jax.random.key(0), images[:1])
    layers = quantize.list_layers(model, variables, images[:1])
    choices, task = dict.fromkeys(layers, CHOICES), tasks.build("classification")
    teacher = np.asarray(quantize.predict(model, variables, {}, images))
    batch = {"image": images, "label": teacher.argmax(-1), "mask": np.ones(len(images))}
    evaluator = evaluate.Evaluator(
        network=model,
        task=task,
        variables=variables,
        choices=choices,
        bank=bank.fill(model, variables, choices, [images[:256]], quantize.MSE()),
        held=evaluate.hold_out(model, variables, task, [batch], teacher),
    )
    return evaluator, layers


def _rates(evaluator) -> dict[str, float]:
    """Policies a minute, one or several a call, in turns."""
    rng = np.random.default_rng(1)
    draw = lambda count: [
        tuple(rng.integers(len(bits)) for bits in evaluator.choices.values()) for _ in range(count)
    ]
    rates: dict[int, list[float]] = {1: [], AT_ONCE: []}
    for at_once in rates:  # compiles
        evaluator.at_once = at_once
        evaluator(draw(at_once))
    end = time.perf_counter() + 2 * SECONDS.value
    while time.perf_counter() < end:
        for at_once, speeds in rates.items():
            evaluator.at_once = at_once
            policies, start = draw(5 * AT_ONCE), time.perf_counter()
            evaluator(policies)
            speeds.append(60 * len(policies) / (time.perf_counter() - start))
    evaluator.at_once = 1
    return {f"{at_once} a call": float(np.median(speeds)) for at_once, speeds in rates.items()}


def _searchers(config, shape, evaluator, layers) -> dict[str, dict[str, float]]:
    """Seconds of each searcher itself, its first call (which may compile) and the rest."""
    images = np.random.default_rng(0).normal(size=(64, *shape[1:])).astype(np.float32)
    costs = measured.build(config, images, evaluator.choices, ())
    table, base = sensitivity.measure("kl", evaluator)
    pairs = sensitivity.pairs("kl", evaluator, table, base)
    student = spaces.Student(
        name="student",
        layers=layers,
        choices=evaluator.choices,
        costs=costs,
        sensitivity=table,
        base=base,
        pairs=pairs,
    )
    problem = spaces.make_problem([student], {"average_bits": 3.0})
    figures = {}
    for name in METHODS:
        start, inside = time.perf_counter(), 0.0
        searcher = make(name, problem, seed=0, evaluations=EVALUATIONS.value)
        first, count = None, 0
        while policies := searcher.propose():
            begun = time.perf_counter()
            scores = evaluator([policy[1:] for policy in policies])["kl"]
            inside += time.perf_counter() - begun
            searcher.observe(policies, scores.tolist())
            count += len(policies)
            first = first or time.perf_counter() - start - inside
        seconds = time.perf_counter() - start - inside
        figures[name] = {"evaluations": count, "seconds": seconds, "first": first}
        show(name, figures[name])
    return figures


if __name__ == "__main__":
    run(main)
