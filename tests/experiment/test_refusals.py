"""What an experiment refuses before anything trains."""

import copy

import numpy as np
import pytest

from kdq import config, data, experiment


def replaced(base, path, value):
    changed = copy.deepcopy(base)
    *parents, last = path
    place = changed
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("arms", "ptq", "observer"),
            "msee",
            r"arms\.ptq\.observer.*'msee'.*'mse'.*absmax",
        ),
        (("models", "student", "name"), "cn", r"config\.models\.student.*'cn'.*cnn.*mlp"),
        (("models", "student", "width"), 3, r"config\.models\.student.*'width'.*widths"),
        (
            ("models", "student", "num_classes"),
            7,
            r"models\.student: task classification: the data has 10 classes, the model 7",
        ),
        (("data", "name"), "digit", r"'digit'.*digits.*mnist"),
        (("data", "validation"), "valid", r"no split 'valid'.*train.*validation.*test"),
        (("optimizer", "name"), "adamw", r"config\.optimizer\.name.*'adamw'.*adam, sgd"),
        (("arms", "kd", "teacher"), "teach", r"config\.arms\.kd\.teacher.*'teach'.*'teacher'"),
        (("arms", "kd", "model"), "studnt", r"config\.arms\.kd\.model.*'studnt'.*student"),
        (("quantize", "keep"), ("conv_9",), r"'conv_9'.*conv_0.*conv_1.*head"),
        (("arms", "ptq", "bits"), "W9", r"arms\.ptq\.bits='W9'.*1 to 8"),
        (("rules", "W4A4"), ({"path": ".*"},), r"rules\.W4A4: that name has a meaning"),
        (("models", "student", "widths"), (10**9,), r"models\.student has parameters of .* GiB"),
        (("arms", "ptq", "label_smoothing"), 0.1, r"ptq\.label_smoothing=0\.1: needs epochs"),
        (("arms", "ptq", "without_classes"), (3,), r"ptq\.without_classes=\(3,\): needs epochs"),
        (("search",), {"method": "knapsak"}, r"config\.search\.method.*'knapsak'.*'knapsack'"),
        (
            ("quantize", "fixed_scales"),
            ("conv_0",),
            r"'conv_0' matches none.*conv_0/",
        ),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) and len(value) > 1 else None,
)
def test_an_unknown_name_lists_the_valid_ones(tiny_config, tmp_path, path, value, message):
    workdir = tmp_path / "run"
    with pytest.raises((config.ConfigError, data.DataError), match=f"(?s){message}"):
        experiment.run(config.freeze(replaced(tiny_config(), path, value)), workdir)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("data", "test"),
            "train",
            r"config\.data\.train='train' and config\.data\.test='train' have 1077",
        ),
        (
            ("data", "validation"),
            "train[:50%]",
            r"config\.data\.validation='train\[:50%\]' have 538 ex",
        ),
        (("data", "test"), "validation[300:]", r"validation='validation' and .*test=.* have 60 ex"),
        (("data", "std"), (6.0, 6.0), r"config\.data\.std=\(6\.0, 6\.0\).* each of the 1 channels"),
        (
            ("data", "mean"),
            (1.0, 2.0, 3.0),
            r"data\.mean=.*expected a number, or one for each",
        ),
        (
            ("arms", "kd", "epochs"),
            1e18,
            r"arms\.kd\.epochs=1e\+18 are 1\.68e\+19 steps .*2147483647",
        ),
        (("distill", "unused"), {"terms": {"a": {"loss": "kll"}}}, r"distill\.unused.*'kll'.*'kl'"),
        (
            ("rules", "unused"),
            ({"path": ".*", "weights": {"bits": 0}},),
            r"rules\.unused\[0\].*bits",
        ),
        (
            ("distill", "kd", "terms", "kl", "temperature"),
            0.0,
            r"temperature=0\.0: expected 0\.001 to 1000",
        ),
        (
            ("distill", "kd", "terms", "kl", "temperature"),
            1e30,
            r"re=1e\+30: expected 0\.001",
        ),
        (
            ("distill", "kd", "terms", "kl", "weight"),
            -1.0,
            r"kl\.weight=-1\.0: expected 0 to 1000000",
        ),
        (
            ("distill", "kd", "terms", "kl", "weight"),
            {"kind": "linear", "start": 1.0, "end": -1.0},
            r"kl\.weight=-1\.0: expected 0 to 1000000",
        ),
        (("qat", "damped", "dampen"), -1.0, r"qat\.damped\.dampen=-1\.0: expected 0 to"),
        (("qat", "damped", "least_bits"), {"kind": "constant", "value": 99.0}, r"least_bits=99\.0"),
        (("compute", "remat"), "(", r"config\.compute\.remat='\(' is no regular expression"),
        (("workers"), 10**6, r"config\.workers=1000000: this process has \d+ cores"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_config, tmp_path, path, value, message):
    path = (path,) if isinstance(path, str) else path
    with pytest.raises((config.ConfigError, data.DataError), match=f"(?s){message}") as error:
        experiment.run(config.freeze(replaced(tiny_config(), path, value)), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_one_class_is_nothing_to_learn(tiny_config, tmp_path):
    inputs = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    splits = {"train": inputs[:60], "validation": inputs[60:75], "test": inputs[75:]}
    splits = {name: (rows, np.zeros(len(rows), int)) for name, rows in splits.items()}
    data.save_arrays(tmp_path / "mine.npz", **splits)
    changed = replaced(tiny_config(), ("data",), {"name": "mine.npz", "data_dir": str(tmp_path)})
    with pytest.raises(config.ConfigError, match=r"name='mine\.npz' has 1 class: expected two"):
        experiment.run(config.freeze(changed), tmp_path / "run")


def test_rules_that_fit_no_layer_are_refused(tiny_config, tmp_path):
    changed = replaced(tiny_config(), ("arms", "ptq", "bits"), "grouped")
    weights = {"bits": 4, "granularity": "per_group", "group_size": 5}
    changed["rules"] = {"grouped": ({"path": "head", "weights": weights},)}
    with pytest.raises(config.ConfigError, match=r"rules\.grouped, arm 'ptq'.*group_size=5"):
        experiment.run(config.freeze(changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_arm_lists_the_valid_ones(tiny_experiment, tmp_path):
    with pytest.raises(config.ConfigError, match=r"arm 'kdd' .*'kd'.*teacher.*qad"):
        experiment.run(tiny_experiment, tmp_path / "run", arms=["kd", "kdd"])
    assert not (tmp_path / "run").exists()


def test_an_unknown_augmentation_lists_the_valid_ones(tiny_config, tmp_path):
    changed = replaced(tiny_config(), ("data", "augment"), ({"name": "shft", "pixels": 1},))
    changed["cache"] = {"kind": "none"}
    with pytest.raises(config.ConfigError, match=r"config\.data\.augment.*'shft'.*shift"):
        experiment.run(config.freeze(changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_epochs_too_few_for_one_step_are_refused(tiny_config, tmp_path):
    changed = replaced(tiny_config(), ("arms", "kd", "epochs"), 0.01)
    with pytest.raises(config.ConfigError, match=r"config\.arms\.kd\.epochs=0\.01 is not one step"):
        experiment.run(config.freeze(changed), tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()
