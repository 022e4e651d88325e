"""A search is compared with uniform bits: the best that keep its budgets, trained as it is."""

import copy
import json

import jax
import numpy as np
import pytest

from kdq import config, deploy, experiment
from kdq.config import ConfigError

CHOICES = ("W2A8", "W4A8", "W8A8")


@pytest.fixture(scope="module")
def make(tiny_config):
    """Makes an experiment with `config.search` of these fields."""

    def make(**search):
        fields = copy.deepcopy(tiny_config())
        fields["arms"] = {name: fields["arms"][name] for name in ("teacher", "kd", "qad")}
        fields["arms"]["kd"]["reference"] = ""
        fields["arms"]["qad"]["epochs"] = 0.3
        fields["search"] = {
            **{"students": ("kd",), "teacher": "teacher", "finetune": "qad", "method": "random"},
            **{"choices": CHOICES, "evaluations": 8, "examples": 150},
            **{"most": {"average_bits": 4.0}, **search},
        }
        fields["export"] = {"formats": ("packed",), "arms": ("qad",)}
        return config.freeze(fields)

    return make


def run(made, workdir, name):
    added = experiment.with_search(made, workdir, name)
    arms = experiment.arms_of_search(added, name)
    records = experiment.run(added, workdir, arms=arms)
    return added, arms, {r.arm: r for r in records}


@pytest.mark.slow
def test_the_best_uniform_bits_under_the_same_budget_are_trained_alike(make, tmp_path):
    added, arms, records = run(make(), tmp_path, "found")
    assert arms == ["uniform_ptq", "found_ptq", "uniform_qad", "found_qad"]
    assert {name: records[name].reference for name in arms} == {
        "uniform_ptq": "kd",
        "uniform_qad": "qad",
        "found_ptq": "uniform_ptq",
        "found_qad": "uniform_qad",
    }
    alike = {key: getattr(added.arms["found_qad"], key) for key in vars(added.arms["found_qad"])}
    other = {key: getattr(added.arms["uniform_qad"], key) for key in alike}
    assert {key for key in alike if alike[key] != other[key]} == {"bits", "reference"}
    assert records["found_qad"].steps == records["uniform_qad"].steps > 0

    # By hand: every uniform policy, and those with the most bits at both ends; weights of layers.
    layers = deploy.load_packed(tmp_path / "kd" / "0" / "model.safetensors").variables["params"]
    sizes = {path: layers[path]["kernel"].size for path in layers}
    ends = (next(iter(sizes)), next(reversed(sizes)))
    policies = [dict.fromkeys(sizes, bits) for bits in CHOICES]
    policies += [policy | dict.fromkeys(ends, "W8A8") for policy in policies]
    average = lambda p: sum(sizes[k] * int(p[k][1]) for k in p) / sum(sizes.values())
    kept = {tuple(policy.values()) for policy in policies if average(policy) <= 4}
    (log,) = (tmp_path / "searches" / "uniform" / "0").glob("evaluations-*.jsonl")
    tried = [json.loads(line) for line in log.read_text().splitlines()]
    assert {tuple(one["chosen"][path] for path in sizes) for one in tried} == kept
    best = min(tried, key=lambda one: one["scores"]["kl"])
    told = records["found_ptq"].search
    assert told["uniform"]["chosen"] == best["chosen"]
    assert told["uniform"]["scores"] == best["scores"]
    assert told["uniform"]["same"] == (told["chosen"] == best["chosen"])
    assert records["uniform_qad"].policy == {path: best["chosen"][path] for path in sizes}
    assert "uniform" not in records["uniform_ptq"].search


@pytest.fixture(scope="module")
def equal(make, tmp_path_factory):
    """`(workdir, records)` of a search that can find nothing but uniform bits."""
    workdir = tmp_path_factory.mktemp("equal")
    return workdir, run(make(choices=("W2A8",)), workdir, "found")[2]


@pytest.mark.slow
def test_the_same_policy_is_said_and_trained_once(equal, make, tmp_path):
    workdir, records = equal
    for stage in ("ptq", "qad"):
        record, other = records[f"found_{stage}"], records[f"uniform_{stage}"]
        assert record.search["uniform"]["same"] is True
        assert record.shared_from == f"uniform_{stage}/0"
        assert other.shared_from == ""
        for key in ("metrics", "size_bytes", "policy", "train_seconds", "steps"):
            assert getattr(record, key) == getattr(other, key)
        for key in ("arm", "bits", "arm_digest", "reference"):
            assert getattr(record, key) != getattr(other, key)
    # The same as where there is nothing to copy from.
    added = experiment.with_search(make(choices=("W2A8",)), tmp_path, "found")
    alone = experiment.run(added, tmp_path, arms=["found_qad"])[-1]
    assert (alone.arm, alone.shared_from) == ("found_qad", "")
    assert alone.search.get("uniform") is None
    assert alone.value("accuracy") == records["found_qad"].value("accuracy")
    files = [
        deploy.load_packed(folder / "found_qad" / "0" / "model.safetensors")
        for folder in (workdir, tmp_path)
    ]
    jax.tree.map(np.testing.assert_array_equal, files[0].variables, files[1].variables)
    jax.tree.map(np.testing.assert_array_equal, files[0].qparams, files[1].qparams)


@pytest.mark.slow
def test_another_method_under_the_same_budget_has_the_same_baseline(equal, make):
    workdir, records = equal
    added, arms, more = run(make(choices=("W2A8",), method="greedy"), workdir, "second")
    assert arms == ["uniform_ptq", "second_ptq", "uniform_qad", "second_qad"]
    assert set(added.searches) == {"found", "uniform", "second"}
    assert more["uniform_qad"] == records["uniform_qad"]
    assert more["second_qad"].search["uniform"]["same"] is True


def test_names_of_baselines(make, tmp_path):
    names = lambda made, name: set(experiment.with_search(made, tmp_path, name).searches)
    assert names(make(), "found") == {"found", "uniform"}
    assert names(make(method="uniform"), "found") == {"found"}  # it is one
    assert names(make(method="uniform"), "uniform") == {"uniform"}
    assert names(make(), "uniform") == {"uniform", "uniform_uniform"}
    # Other budgets in a workdir that has a search.
    first = experiment.with_search(make(), tmp_path, "found")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json(first)))
    assert names(make(method="greedy"), "second") == {"found", "uniform", "second"}
    tighter = make(most={"average_bits": 3.0})
    assert names(tighter, "third") == {"found", "uniform", "third", "third_uniform"}
    added = experiment.with_search(tighter, tmp_path, "third")
    assert experiment.arms_of_search(added, "third")[0] == "third_uniform_ptq"
    assert added.searches["third_uniform"].most.average_bits == 3.0
    assert added.arms["found_qad"].reference == "uniform_qad"


def test_every_uniform_policy_is_tried_however_few_evaluations_there_are(make, tmp_path):
    added = experiment.with_search(make(evaluations=1), tmp_path, "found")
    assert added.searches["uniform"].evaluations == 2 * len(CHOICES)
    assert added.searches["found"].evaluations == 1
    with pytest.raises(ConfigError, match=r"config\.search\.evaluations=0"):
        experiment.with_search(make(evaluations=0), tmp_path, "found")
