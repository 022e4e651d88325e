"""The measures of transfer against plain calls, and what is computed and compiled once."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from kdq import files, quantize
from kdq.distill import capture
from kdq.evaluate import attribution, boundary, cka
from kdq.experiment.transfer import Comparison, Predictor
from kdq.quantize import Weights
from kdq.schema import Transfer

PROBES = ("cka", "attribution", "boundary")
CONFIG = Transfer(examples=24, pairs=8, epsilon=0.3)
IMAGES = np.random.default_rng(0).normal(size=(24, 4, 4, 1)).astype(np.float32)

traced: list[int] = []  # a model's width, each time that it is traced
ran: list[int] = []  # and each time that its program runs it


class Small(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        traced.append(self.width)
        jax.debug.callback(lambda: ran.append(self.width))
        x = nn.tanh(nn.Conv(self.width, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def make(width: int, seed: int, bits: bool = False) -> Predictor:
    model = Small(width=width)
    variables = model.init(jax.random.key(seed), IMAGES, train=False)
    qparams = {}
    if bits:
        rules = quantize.uniform_rules(4, 8)
        qparams = quantize.calibrate(model, variables, rules, [IMAGES])
    return Predictor(weights=Weights(variables=variables, qparams=qparams), network=model)


def plain(predictor: Predictor):
    """With the weights closed over."""
    weights = predictor.weights
    return lambda images: quantize.apply(
        predictor.network, weights.variables, weights.qparams, images
    )


def means(predictor: Predictor) -> dict[str, np.ndarray]:
    """The layers' outputs, averaged over positions, without jit."""
    weights = predictor.weights
    outputs, _ = capture.run(
        predictor.network, weights.variables, weights.qparams, IMAGES, ("conv", "head")
    )
    conv, head = (np.asarray(outputs.features[name], np.float64) for name in ("conv", "head"))
    return {"conv": conv.mean((1, 2)), "head": head}


@pytest.mark.slow
def test_measures_are_those_of_plain_functions():
    student, teacher = make(5, 1, bits=True), make(7, 2)
    found = Comparison(teacher, IMAGES, CONFIG, PROBES).measure(student)
    fns = plain(student), plain(teacher)
    alike = attribution.Explanation(fns[1], IMAGES).similarity(fns[0])
    moved = boundary.adversarial_images(fns[1], IMAGES, 0.3)
    expected = {
        "attribution_cosine": alike["cosine"],
        "attribution_rank": alike["rank_correlation"],
        "path_agreement": boundary.probe_paths(fns[1], IMAGES, pairs=8).agreement(fns[0]),
        "adversarial_agreement": boundary.probe_images(fns[1], moved).agreement(fns[0]),
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-5)
    assert all(abs(value) < 0.999 for value in expected.values())
    matrix: dict[str, dict[str, float]] = {}
    for (layer, other), value in cka.layer_cka(means(student), means(teacher)).items():
        matrix.setdefault(layer, {})[other] = value
    assert set(found["cka"]) == set(matrix)
    for own, row in matrix.items():
        assert found["cka"][own] == pytest.approx(row, rel=1e-4)


@pytest.mark.slow
def test_a_teacher_runs_once_and_networks_of_one_structure_compile_once():
    # Widths of no other test, whose programs would serve here too.
    networks = {bits: [make(6, seed, bits) for seed in (3, 4)] for bits in (False, True)}
    teacher, next_teacher = make(8, 2), make(8, 5)
    comparison = Comparison(teacher, IMAGES, CONFIG, PROBES)
    jax.effects_barrier()
    assert 8 in ran
    found = []
    for first, second in networks.values():
        traced.clear()
        ran.clear()
        found.append(comparison.measure(first))
        assert set(traced) == {6}
        traced.clear()
        found.append(comparison.measure(second))
        assert traced == []
        jax.effects_barrier()
        assert set(ran) == {6}
    assert len({value["attribution_cosine"] for value in found}) == 4
    other = Comparison(next_teacher, IMAGES, CONFIG, PROBES).measure(networks[False][0])
    assert traced == []
    assert other["attribution_cosine"] != found[0]["attribution_cosine"]


@pytest.mark.slow
def test_a_teacher_of_one_class_has_no_path():
    teacher, student = make(7, 2), make(5, 1)
    params = dict(teacher.weights.variables["params"])
    params["head"] = {**params["head"], "bias": np.float32([100, 0, 0])}
    sure = teacher.replace(weights=Weights(variables={"params": params}, qparams={}))
    share = (np.asarray(plain(student)(IMAGES)).argmax(-1) == 0).mean()
    assert 0 < share < 1
    config = dataclasses.replace(CONFIG, epsilon=0.0)
    found = Comparison(sure, IMAGES, config, PROBES).measure(student)
    assert np.isnan(found["path_agreement"])
    assert found["adversarial_agreement"] == pytest.approx(share)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf")])
def test_a_measure_that_is_no_number_is_none_in_a_record(value):
    """The loss on a class that a model rules out is infinite, which JSON can't say."""
    assert files.plain({"nll": value}) == {"nll": None}
    assert files.plain({"nll": np.float64(0.5)}) == {"nll": 0.5}
