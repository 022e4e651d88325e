"""Searches whose policies are judged after a short training."""

import numpy as np
import pytest
from compilations import count_compilations
from searches import TAUGHT, searched

from kdq import config
from kdq.experiment import plan as plan_module
from kdq.experiment import searching, training
from kdq.experiment.context import Context
from kdq.experiment.searching import SearchResult
from kdq.quantize.network import Weights
from kdq.search import bank, evaluate
from kdq.train import loop


@pytest.fixture
def trained(make_config):
    """Makes an experiment whose policies are finetuned by a recipe with two terms."""

    def trained(terms=("kl", "soft"), distilled=("soft",), **fields):
        both = {
            "kl": {"loss": "kl", "weight": 0.7, "temperature": 2.0},
            "soft": {"loss": "hard_label", "weight": 2.0},
        }
        search = searched(steps=2, evaluations=3, distilled=distilled, finetune="qad", **fields)
        made = make_config({"tuned": search}, qad=False)
        made["distill"] = {"kd": {"task": 0.3, "terms": {name: both[name] for name in terms}}}
        # Float arms without a teacher are the same whatever the recipe.
        made["arms"]["qad"] = {
            **{"model": "student", "init": "wide", "bits": "W4A8", "epochs": 0.2},
            "learning_rate": 3e-2,
            **TAUGHT,
        }
        return made

    return trained


def scorer(fields, workdir):
    """The score of an experiment's one search, and what it is of."""
    context = Context(config.freeze(fields), workdir)
    (search,) = context.experiment.searches.values()
    students = [searching.prepare_student(context, search, arm, 0) for arm in search.students]
    return searching.scorer(context, search, students, 0), students


def test_policies_are_finetuned_by_one_compiled_step_and_always_alike(trained, folder):
    score, (student,) = scorer(trained(), folder)
    policies = [(0, 0, 1, 2, 1), (0, 2, 2, 2, 0), (0, 0, 0, 0, 0), (0, 0, 1, 2, 1)]
    with count_compilations("train_step") as compiled:
        first = score(policies)
    assert len(compiled) == 1
    assert first[0] == first[3]
    again, _ = scorer(trained(), folder)
    assert again(policies) == first
    assert len({one["kl"] for one in first}) == 3
    # It was trained: calibration alone scores otherwise.
    calibrated = student.evaluator([policy[1:4] for policy in policies])
    assert all(abs(one["kl"] - k) > 1e-4 for one, k in zip(first, calibrated["kl"], strict=True))


def test_a_term_that_is_left_out_has_no_effect(trained, folder):
    whole, _ = scorer(trained(), folder)
    without, _ = scorer(trained(terms=("kl",), distilled=()), folder)
    on, off = whole([(0, 0, 1, 2, 1), (0, 0, 1, 2, 0)])
    (expected,) = without([(0, 0, 1, 2)])
    for objective, value in expected.items():
        assert off[objective] == pytest.approx(value, rel=1e-5, abs=1e-7)
    assert abs(on["kl"] - off["kl"]) > 1e-5


def test_two_steps_by_hand(trained, folder):
    """The same scores from the loop's own pieces: the term is on, its weight as in the recipe."""
    score, (student,) = scorer(trained(), folder)
    (scores,) = score([(0, 1, 1, 1, 1)])
    context = Context(config.freeze(trained()), folder)
    evaluator = student.evaluator
    qparams = bank.choose(evaluator.bank, dict.fromkeys(evaluator.choices, np.int32(1)))
    start = Weights(variables=evaluator.variables, qparams=qparams)
    plan, state = training.make_plan(
        context.experiment,
        "qad",
        0,
        start,
        model=evaluator.network.module,
        inputs=context.inputs,
        teaching=context.teachers.teaching("qad", 0),
        steps=2,
    )
    assert plan.steps == 2
    state = loop.take_steps(plan, state)
    variables = {**evaluator.variables, "params": state.params}
    quantizers = loop.weights(state).qparams
    weights = Weights(variables=variables, qparams=quantizers)
    by_hand = evaluate.score(evaluator.network, weights, evaluator.task, evaluator.held)
    for objective, value in by_hand.items():
        assert scores[objective] == pytest.approx(value, rel=1e-4)


def test_an_arm_leaves_out_the_terms_that_were(trained):
    frozen = config.freeze(trained())
    base = {"conv_0": "W2A8", "conv_1": "W4A8", "head": ""}
    for kept, terms in (("on", ["kl", "soft"]), ("off", ["kl"])):
        chosen = {"student": "wide", **base, "distill/soft": kept}
        found = SearchResult(name="tuned", chosen=chosen, observer="mse", description={})
        assert found.layers == base
        applied = found.applied(frozen, "qad")
        assert list(applied.distill["kd"].terms) == terms
        assert list(frozen.distill["kd"].terms) == ["kl", "soft"]


def test_a_changed_recipe_is_another_search(trained):
    """All that a finetune goes by is in the digest of the search; what does not matter is not."""

    def digest(change=lambda fields: None):
        fields = trained()
        change(fields)
        frozen = config.freeze(fields)
        return plan_module.search_digest(frozen, "tuned", plan_module.digests(frozen))

    base = digest()
    for change in (
        lambda f: f["distill"]["kd"].update(task=0.2),
        lambda f: f["quantize"].update(fixed_scales=("conv_0/activations",)),
        lambda f: f["searches"]["tuned"].update(steps=3),
        lambda f: f["arms"]["wide"].update(epochs=0.5),
        lambda f: f["arms"]["teacher"].update(epochs=0.5),
        lambda f: f.update(qat={"slow": {"dampen": 0.1}}) or f["arms"]["qad"].update(qat="slow"),
    ):
        assert digest(change) != base
    assert digest(lambda f: f["arms"]["narrow"].update(epochs=0.5)) == base
    assert digest(lambda f: f["searches"]["tuned"].update(other_device=True)) == base
