"""What an experiment refuses before anything trains."""

import copy

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
        (("models", "student", "num_classes"), 7, r"student\.num_classes=7.*digits has 10"),
        (("data", "name"), "digit", r"'digit'.*digits.*mnist"),
        (("data", "validation"), "valid", r"no split 'valid'.*train.*validation.*test"),
        (("optimizer", "name"), "adamw", r"config\.optimizer\.name.*'adamw'.*adam, sgd"),
        (("arms", "kd", "teacher"), "teach", r"config\.arms\.kd\.teacher.*'teach'.*'teacher'"),
        (("arms", "kd", "model"), "studnt", r"config\.arms\.kd\.model.*'studnt'.*student"),
        (("quantize", "keep"), ("conv_9",), r"'conv_9'.*conv_0.*conv_1.*head"),
        (("arms", "ptq", "bits"), "W9", r"arms\.ptq\.bits='W9'.*1 to 8"),
        (("rules", "W4A4"), ({"path": ".*"},), r"rules\.W4A4: that name has a meaning"),
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
