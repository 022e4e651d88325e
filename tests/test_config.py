"""Configs: what is refused, with which words, and what a digest tells apart."""

import copy
import dataclasses
import os
import re

import ml_collections
import pytest

from kdq import config as kdq_config
from kdq.config import ConfigError, complete, freeze, parse_arg, parse_bits


def _config(**changes):
    """Four arms of one model, one of another."""
    config = {
        "seeds": (0, 1),
        "data": {"name": "digits", "batch_size": 32},
        "models": {
            "small": {"name": "cnn", "widths": [4, 8]},
            "large": {"name": "cnn", "widths": (16, 32)},
        },
        "distill": {"soft": {"task": 0.1, "terms": {"kl": {"loss": "kl", "weight": 0.9}}}},
        "arms": {
            "teacher": {"model": "large", "epochs": 2},
            "labels": {"model": "small", "epochs": 2},
            "kd": {
                "model": "small",
                "epochs": 2,
                "teacher": "teacher",
                "distill": "soft",
                "reference": "labels",
            },
            "ptq": {"model": "small", "init": "kd", "bits": "W4A4"},
            "qad": {
                "model": "small",
                "init": "kd",
                "bits": "W4",
                "epochs": 1,
                "teacher": "kd",
                "distill": "soft",
            },
        },
    }
    config = copy.deepcopy(config)
    for path, value in changes.items():
        at = config
        *parents, last = path.split("__")
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = value
    return config


def _refused(config, *words):
    with pytest.raises(ConfigError) as error:
        freeze(config)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"


def test_freeze_types_every_field_and_fills_the_defaults():
    experiment = freeze(_config(data__mean=3, data__std=[1, 2.5], evaluations=7))
    assert experiment.seeds == (0, 1)
    assert experiment.models["small"]["widths"] == (4, 8)
    assert (experiment.data.mean, experiment.data.std) == (3.0, (1.0, 2.5))
    assert type(experiment.data.mean) is float
    assert type(experiment.arms["teacher"].epochs) is float
    assert (experiment.evaluations, experiment.optimizer.name) == (7, "adam")
    assert list(experiment.arms) == ["teacher", "labels", "kd", "ptq", "qad"]
    kinds = {name: arm.kind for name, arm in experiment.arms.items()}
    assert kinds == {
        "teacher": "labels",
        "labels": "labels",
        "kd": "KD",
        "ptq": "PTQ",
        "qad": "QAD",
    }
    assert dataclasses.replace(experiment.arms["qad"], teacher="").kind == "QAT"
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.evaluations = 8


def test_config_dict_and_mapping_freeze_alike_and_flags_override():
    config = ml_collections.ConfigDict(_config(data__augment=({"name": "shift", "pixels": 2},)))
    config.cache = {"kind": "none"}
    plain = _config(data__augment=[{"name": "shift", "pixels": 2}], cache__kind="none")
    assert freeze(config) == freeze(plain)
    config.update_from_flattened_dict({"arms.kd.epochs": 9, "data.batch_size": 16})
    experiment = freeze(config)
    assert (experiment.arms["kd"].epochs, experiment.data.batch_size) == (9.0, 16)
    assert experiment.data.augment == ({"name": "shift", "pixels": 2},)


def test_arm_spells_out_every_field_so_that_a_flag_can_override_it():
    spelled = kdq_config.arm(model="small", epochs=3)
    assert set(spelled) == {f.name for f in dataclasses.fields(kdq_config.Arm)}
    assert spelled["epochs"] == 3.0
    assert freeze(_config(arms__labels=spelled)).arms["labels"] == kdq_config.Arm(
        model="small", epochs=3.0
    )
    with pytest.raises(ConfigError, match=r"'modle' \(did you mean 'model'\?\)"):
        kdq_config.arm(modle="small")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sedes": (1,)}, ["'sedes'", "did you mean 'seeds'?", "valid: seeds, "]),
        ({"data__batchsize": 3}, ["config.data", "did you mean 'batch_size'?", "eval_batch_size"]),
        ({"arms__kd__epoch": 3}, ["config.arms.kd", "did you mean 'epochs'?", "distill"]),
        ({"arms__kd__distill": "sof"}, ["config.arms.kd.distill", "'soft'?", "valid: soft"]),
        ({"distill__soft__tasks": 1}, ["config.distill.soft", "'task'?", "valid: task, terms"]),
        ({"teachers__both__kind": "ensembl"}, ["config.teachers.both.kind", "'ensemble'?"]),
        ({"teachers__both": {"kind": "ensemble", "arms": ("kdd",)}}, ["teachers.both", "'kd'?"]),
        ({"teachers__two": {"kind": "peer", "model": "smal"}}, ["teachers.two.model", "'small'?"]),
        (
            {"teachers__two": {"kind": "peer", "model": "small", "init": "teacher"}},
            ["teachers.two.init='teacher'", "a float 'large'", "expected a float 'small'"],
        ),
        (
            {"teachers__two": {"kind": "former_peer", "arm": "kd"}},
            ["teachers.two.arm='kd'", "not taught by a peer"],
        ),
        ({"cache__kind": "topk"}, ["config.cache.kind", "'top_k'?", "none, memory, dense"]),
        ({"arms__kd__model": "smal"}, ["arms.kd.model", "'small'?", "valid: small, large"]),
        ({"arms__kd__teacher": "techer"}, ["arms.kd.teacher", "'teacher'?", "labels, kd, ptq"]),
        ({"arms__ptq__init": "qd"}, ["arms.ptq.init", "valid: teacher, labels"]),
        ({"arms__kd__reference": "label"}, ["arms.kd.reference", "'labels'?"]),
        ({"teacher": "nobody"}, ["config.teacher", "'nobody'", "valid: teacher, labels"]),
        ({"models__small": {"widths": [4]}}, ["config.models.small.name is missing"]),
    ],
    ids=lambda v: next(iter(v)),
)
def test_an_unknown_name_is_met_with_the_close_and_the_valid_ones(changes, words):
    _refused(_config(**changes), *words)


@pytest.mark.parametrize("key", ["seeds", "data", "models", "arms"])
def test_a_missing_key_is_named(key):
    config = _config()
    del config[key]
    _refused(config, f"config.{key} is missing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 3}, ["config.seeds=3", "list or tuple"]),
        ({"seeds": (0, "1")}, ["config.seeds[1]='1'", "expected int"]),
        ({"seeds": (True,)}, ["config.seeds[0]=True", "expected int"]),
        ({"data__batch_size": 32.0}, ["config.data.batch_size=32.0", "expected int"]),
        ({"data__mean": "0.5"}, ["config.data.mean='0.5'", "expected float", "list or tuple"]),
        ({"arms__kd__epochs": "3"}, ["config.arms.kd.epochs='3'", "expected float"]),
        ({"arms__kd__epochs": True}, ["config.arms.kd.epochs=True", "expected float"]),
        ({"arms__kd__epochs": float("nan")}, ["config.arms.kd.epochs=nan", "finite"]),
        ({"arms__kd__learning_rate": float("inf")}, ["arms.kd.learning_rate=inf", "finite"]),
        ({"arms__kd": "small"}, ["config.arms.kd='small'", "expected a mapping"]),
        ({"arms": ["kd"]}, ["config.arms=['kd']", "expected a mapping"]),
        ({"arms__kd__augment": 1}, ["config.arms.kd.augment=1", "expected bool"]),
        ({"quantize": {"keep": "head"}}, ["config.quantize.keep='head'", "list or tuple"]),
        ({"teacher": None}, ["config.teacher=None", "expected str"]),
    ],
    ids=str,
)
def test_a_wrong_type_names_the_key_the_value_and_the_type(changes, words):
    _refused(_config(**changes), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": ()}, ["config.seeds is empty", "one or more"]),
        ({"seeds": (1, 1)}, ["all different"]),
        ({"evaluations": 0}, ["config.evaluations=0", "at least 1"]),
        ({"data__batch_size": 0}, ["config.data.batch_size=0"]),
        ({"data__eval_batch_size": -1}, ["config.data.eval_batch_size=-1"]),
        ({"quantize__calibration_examples": 0}, ["config.quantize.calibration_examples=0"]),
        ({"quantize__fixed_scales": ("(",)}, ["config.quantize.fixed_scales", "'('"]),
        ({"quantize__keep_bits": 9}, ["config.quantize.keep_bits=9", "1 to 8"]),
        ({"arms__a/b": {"model": "small", "epochs": 1}}, ["config.arms.a/b", "folder"]),
        ({"arms__..": {"model": "small", "epochs": 1}}, ["config.arms...", "folder"]),
        ({"arms__kd__epochs": -1.0}, ["config.arms.kd.epochs=-1.0"]),
        ({"arms__labels__epochs": 0}, ["config.arms.labels.epochs=0.0", "more than 0"]),
        ({"arms__kd__label_smoothing": 1.0}, ["arms.kd.label_smoothing=1.0", "0 to below 1"]),
        ({"arms__kd__learning_rate": 0}, ["config.arms.kd.learning_rate=0.0", "more than 0"]),
        ({"arms__kd__stop": 3.0}, ["config.arms.kd.stop=3.0", "0 to the 2.0 epochs"]),
        ({"arms__ptq__load": "x"}, ["config.arms.ptq: init='kd' and load='x'", "one of them"]),
        ({"arms__kd__distill": ""}, ["config.arms.kd", "distill=''", "both or neither"]),
        ({"arms__labels__distill": "soft"}, ["config.arms.labels", "both or neither"]),
        ({"teachers__kd": {"kind": "packed", "path": "x"}}, ["teachers.kd", "an arm of that name"]),
        ({"teachers__m": {"kind": "moving_average", "decay": 1.0}}, ["teachers.m.decay=1.0"]),
        ({"teachers__e": {"kind": "ensemble", "arms": ()}}, ["teachers.e.arms is empty"]),
        (
            {"teachers__e": {"kind": "ensemble", "arms": ("kd",), "weights": (1, 2)}},
            ["teachers.e.weights=(1.0, 2.0)", "1 numbers"],
        ),
        (
            {"teachers__e": {"kind": "ensemble", "arms": ("kd",), "average": "mean"}},
            ["teachers.e.average", "probability, logit"],
        ),
        ({"cache": {"kind": "top_k"}}, ["config.cache: size=0", "at least 1"]),
        ({"cache": {"kind": "dense", "size": 3}}, ["config.cache: size=3", "0 with the others"]),
        ({"cache__temperature": 0}, ["config.cache.temperature=0.0"]),
        ({"arms__kd__learning_rate": -1e-3}, ["config.arms.kd", "more than 0"]),
        ({"arms__kd__bits": "W9"}, ["config.arms.kd.bits='W9'"]),
        ({"arms__ptq__init": "teacher"}, ["arms.ptq.init", "'large'", "same model"]),
        ({"arms__labels__init": "ptq"}, ["arms.labels.init='ptq' is quantized", "float"]),
        (
            {"arms__ptq__distill": "soft", "arms__ptq__teacher": "kd"},
            ["ptq.distill", "needs epochs"],
        ),
        ({"compute__dtype": "float64"}, ["config.compute.dtype", "'float64'", "bfloat16"]),
        ({"arms__kd__reference": "kd"}, ["config.arms.kd.reference='kd'", "another arm"]),
        ({"seeds": (-1,)}, ["config.seeds[0]=-1", "0 to below 4294967296"]),
        ({"seeds": (2**32,)}, ["config.seeds[0]=4294967296", "0 to below 4294967296"]),
        ({"arms__kd__seed_offset": -1}, ["kd.seed_offset=-1", "seed 0", "that is -1"]),
        ({"arms__kd__seed_offset": 2**32 - 1}, ["kd.seed_offset", "seed 1", "that is 4294967296"]),
        ({"data__std": 0.0}, ["config.data.std=0.0", "at least 1e-20"]),
        ({"data__std": (6.0, -6.0)}, ["config.data.std[1]=-6.0", "at least 1e-20"]),
        ({"data__mean": ()}, ["config.data.mean is empty"]),
        ({"optimizer__warmup": 2.0}, ["config.optimizer.warmup=2.0", "0 to 1"]),
        ({"optimizer__weight_decay": -1.0}, ["config.optimizer.weight_decay=-1.0", "0 to 1000000"]),
        ({"workers": -1}, ["config.workers=-1", "at least 0"]),
        ({"checkpoint_seconds": -1.0}, ["config.checkpoint_seconds=-1.0"]),
        ({"distill__soft__task": -0.1}, ["config.distill.soft.task=-0.1", "0 to 1000000"]),
        ({"distill__soft__terms": {}}, ["config.distill.soft.terms is empty"]),
        ({"transfer__epsilon": 1e30}, ["config.transfer.epsilon=1e+30", "0 to 1000"]),
        ({"arms__plots": {"model": "small", "epochs": 1}}, ["config.arms.plots", "kdq's own"]),
        ({"arms__CON": {"model": "small", "epochs": 1}}, ["config.arms.CON", "Windows"]),
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_refused(changes, words):
    _refused(_config(**changes), *words)


def test_arms_that_need_each_other_are_shown_as_a_circle():
    _refused(_config(arms__kd__init="kd"), "circle: kd -> kd")
    config = _config()
    config["arms"]["teacher"] |= {"teacher": "labels", "distill": "soft"}
    config["arms"]["labels"] |= {"teacher": "kd", "distill": "soft"}
    _refused(config, "circle: teacher -> labels -> kd -> teacher")
    # A reference is no need: two arms may each be compared with the other.
    mutual = freeze(_config(arms__labels__reference="kd"))
    assert kdq_config.ancestors(mutual, "kd") == ("teacher", "kd")


def test_ancestors_come_before_what_needs_them():
    experiment = freeze(_config())
    assert kdq_config.ancestors(experiment, "qad") == ("teacher", "kd", "qad")
    assert kdq_config.ancestors(experiment, "labels") == ("labels",)


def test_a_chain_of_arms_may_be_longer_than_pythons_stack():
    config = _config()
    previous = "teacher"
    for i in range(1200):
        config["arms"][f"a{i}"] = {"model": "large", "init": previous, "bits": "W8"}
        previous = f"a{i}"
    experiment = freeze(config)
    assert len(experiment.arms) == 1205
    order = kdq_config.ancestors(experiment, previous)
    assert order == ("teacher", *(f"a{i}" for i in range(1200)))
    config["arms"]["teacher"]["init"] = previous  # float of a quantized one, and around
    _refused(config, "config.arms.teacher.init='a1199' is quantized")
    for arm in config["arms"].values():
        arm |= {"bits": "W8"} if arm["model"] == "large" else {}
    _refused(config, "circle: teacher -> a1199 -> a1198 -> ")


def test_a_users_own_folder_is_known_in_every_path_of_a_config():
    home = os.path.expanduser("~")
    config = _config(
        data__data_dir="~/tfds",
        data__name="~/mine.npz",
        arms__loaded={"model": "small", "load": "~/m.safetensors"},
        teachers__file={"kind": "packed", "path": "~/t.safetensors"},
    )
    experiment = freeze(config)
    paths = (
        experiment.data.data_dir,
        experiment.data.name,
        experiment.arms["loaded"].load,
        experiment.teachers["file"].path,
    )
    names = ("tfds", "mine.npz", "m.safetensors", "t.safetensors")
    assert paths == tuple(f"{home}/{name}" for name in names)
    _refused(_config(data__data_dir="~no-such-user"), "config.data.data_dir", "no user of that")


def test_parse_arg_takes_the_types_of_the_defaults():
    defaults = {"quick": False, "seeds": 3, "rate": 0.5, "model": "cnn"}
    assert parse_arg(None, **defaults).to_dict() == defaults
    assert parse_arg("", **defaults).to_dict() == defaults
    given = parse_arg("quick,seeds=10, rate=2,model=mlp", **defaults)
    assert given.to_dict() == {"quick": True, "seeds": 10, "rate": 2.0, "model": "mlp"}
    assert type(given.rate) is float
    for text, value in {"true": True, "False": False, "1": True, "0": False}.items():
        assert parse_arg(f"quick={text}", quick=not value).quick is value


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("quik", r"unknown config argument 'quik' \(did you mean 'quick'\?\); valid: quick, seeds"),
        ("seeds=three", "config argument seeds='three': expected int"),
        ("seeds=1.5", "config argument seeds='1.5': expected int"),
        ("seeds", "config argument seeds='': expected int"),
        ("quick=yes", "config argument quick='yes': expected true or false"),
    ],
)
def test_parse_arg_refuses(arg, message):
    with pytest.raises(ConfigError, match=message):
        parse_arg(arg, quick=False, seeds=3)


def test_parse_bits():
    given = {"W4A8": (4, 8), "W4": (4, None), "A8": (None, 8), "": (None, None), "W1A1": (1, 1)}
    assert {text: parse_bits(text) for text in given} == given


@pytest.mark.parametrize(
    "text", ["W9", "W0A4", "A4W4", "w4a4", "W4A", "4", "W4A4 ", "W10", "W4A44"]
)
def test_parse_bits_refuses_and_says_where(text):
    with pytest.raises(ConfigError, match=re.escape(f"here={text!r}: expected 'W4A4'")):
        parse_bits(text, where="here")


def test_digest_forgets_the_order_of_keys_and_the_kind_of_sequence():
    experiment = freeze(_config())
    digest = kdq_config.digest(experiment)
    assert re.fullmatch("[0-9a-f]{16}", digest)
    config = _config(models__small__widths=(4, 8), seeds=[0, 1])
    config["arms"] = dict(reversed(config["arms"].items()))
    assert kdq_config.digest(freeze(dict(reversed(config.items())))) == digest
    assert kdq_config.digest({"b": [1], "a": "x"}) == kdq_config.digest({"a": "x", "b": (1,)})


def test_digest_is_the_one_that_earlier_results_were_filed_under():
    # printf '%s' '{"a":[1,2.5,null],"b":true}' | sha256sum
    assert kdq_config.digest({"b": True, "a": (1, 2.5, None)}) == "5bfed00731eb76e3"


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": (0, 2)},
        {"seeds": (1, 0)},
        {"data__name": "mnist"},
        {"data__mean": 1.0},
        {"models__small__widths": (4, 9)},
        {"models__small__widths": (8, 4)},
        {"models__small__batch_norm": True},
        {"distill__soft__task": 0.2},
        {"distill__soft__terms__kl__temperature": 3.0},
        {"teachers__m": {"kind": "moving_average"}},
        {"arms__kd__reference": ""},
        {"arms__extra": {"model": "small", "epochs": 1}},
        {"optimizer__weight_decay": 1e-4},
        {"quantize__fixed_scales": (".*",)},
        {"cache__kind": "none"},
    ],
    ids=str,
)
def test_digest_changes_with_every_field(changes):
    assert kdq_config.digest(freeze(_config(**changes))) != kdq_config.digest(freeze(_config()))


def test_every_field_of_every_part_is_in_the_digest():
    experiment = freeze(_config())
    for part in (experiment.data, experiment.optimizer, experiment.quantize, experiment.arms["kd"]):
        assert set(kdq_config.to_json(part)) == {f.name for f in dataclasses.fields(part)}


def test_a_dtype_of_all_models_is_a_field_of_each(tiny_config):
    given = tiny_config()
    given["compute"] = {"dtype": "bfloat16"}
    found = freeze(given)
    assert {fields["dtype"] for fields in found.models.values()} == {"bfloat16"}
    spelled = {name: {**fields, "dtype": "bfloat16"} for name, fields in given["models"].items()}
    assert found == freeze({**tiny_config(), "models": spelled})


def test_complete_spells_out_what_is_left_and_changes_nothing(tiny_config):
    plain = ml_collections.ConfigDict(tiny_config())
    before = freeze(plain)
    completed = complete(plain)
    assert completed.mesh.data == 1
    assert completed.optimizer.warmup == 0.05
    assert completed.data.batch_size == 64
    assert freeze(completed) == before
