"""Mistakes in the config of a search are told before anything runs."""

import copy

import pytest
from searches import TAUGHT, searched

from kdq import config, experiment
from kdq.config import ConfigError

MISTAKES = {
    "method": (
        {"method": "knapsak"},
        r"searches\.four\.method: 'knapsak' \(did you mean 'knapsack'",
    ),
    "option": (
        {"method": "nsga2", "options": {"populaton": 5}},
        r"key in config\.searches\.four\.options: 'populaton' \(did you mean 'population'",
    ),
    "objective": ({"objective": "kll"}, r"four\.objective: 'kll'.*valid: kl, loss, error, noise"),
    "sensitivity": (
        {"sensitivity": "fischer"},
        r"four\.sensitivity: 'fischer'.*did you mean 'fisher'",
    ),
    "pairs": (
        {"method": "knapsack_pairwise", "sensitivity": "fisher"},
        r"four\.sensitivity of pairs: 'fisher'; valid: kl, loss, error, noise",
    ),
    "observer": ({"observer": "msee"}, r"four\.observer: 'msee'.*'mse'"),
    "no budget": ({"most": {}}, r"four: no budget; expected `most` or `share`"),
    "negative": ({"most": {"size": -1.0}}, r"four\.most\.size=-1\.0: expected at least 0"),
    "both": (
        {"share": {"average_bits": 0.5}},
        r"four: expected `most` or `share` of \['average_bits'\], not both",
    ),
    "metric": ({"most": {"sizes": 1.0}}, r"four\.most: 'sizes' \(did you mean 'size'"),
    "student": ({"students": ("wid",)}, r"four\.students: arm 'wid' \(did you mean 'wide'"),
    "no student": ({"students": ()}, r"four\.students is empty"),
    "teacher": ({"teacher": ""}, r"four\.teacher is missing"),
    "bits": ({"choices": ("W9A8",)}, r"four\.choices\[0\]='W9A8'.*1 to 8"),
    "twice": ({"choices": ("W4", "W4")}, r"four\.choices=.*all different"),
    "fixed": ({"fixed": {"conv_9": "W8A8"}}, r"four\.fixed: 'conv_9' matches none of \['conv_0'"),
    "runtime": ({"runtime": "onix"}, r"four\.runtime: 'onix' \(did you mean 'onnx'"),
    "steps": ({"steps": 2}, r"four\.steps=2: needs `finetune`"),
    "distilled": ({"distilled": ("kl",)}, r"four\.distilled=.*expected steps"),
    "term": (
        {"steps": 1, "finetune": "trained", "distilled": ("kll",)},
        r"four\.distilled: term 'kll' \(did you mean 'kl'",
    ),
    "evaluations": ({"evaluations": 0}, r"four\.evaluations=0: expected at least 1"),
    "table": (
        {"cost_tables": ("nowhere.json",)},
        r"four\.cost_tables='nowhere\.json' can't be read",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_runs(make_config, tmp_path, mistake):
    fields, message = MISTAKES[mistake]
    changed = make_config({"four": searched()})
    changed["arms"]["trained"] = {"model": "student", "init": "wide", "epochs": 0.2, **TAUGHT}
    changed["searches"]["four"] = searched() | copy.deepcopy(fields)
    with pytest.raises(ConfigError, match=message):
        experiment.run(config.freeze(changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f["arms"]["four_ptq"].update(init="narrow", model="narrow"),
            "'narrow': expected a st",
        ),
        (
            lambda f: f["searches"]["four"].update(students=("wide", "four_ptq")),
            "is quantized; expected",
        ),
        (
            lambda f: f["searches"].update(W4A8=searched()),
            r"searches\.W4A8: that name has a meaning",
        ),
        (lambda f: f.update(rules={"four": ({"path": ".*"},)}), r"there are rules of that name"),
    ],
)
def test_arms_and_searches_that_do_not_fit_each_other(make_config, change, message):
    changed = make_config({"four": searched()})
    change(changed)
    with pytest.raises(ConfigError, match=message):
        config.freeze(changed)


def test_too_few_evaluations_for_sensitivities_say_how_many_those_take(make_config, folder):
    search = searched(method="knapsack", evaluations=5)
    frozen = config.freeze(make_config({"four": search}, qad=False))
    with pytest.raises(ConfigError, match=r"four\.evaluations=5: sensitivities alone take 10"):
        experiment.run(frozen, folder, arms=["four_ptq"])
