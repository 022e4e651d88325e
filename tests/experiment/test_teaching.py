"""Arms that are taught by something else than one arm's logits, and by more than logits."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from kdq import config, deploy, experiment, quantize
from kdq.config import ConfigError
from kdq.experiment import transfer
from kdq.experiment.context import Context
from kdq.experiment.inputs import Inputs

HINT = {"loss": "hint", "student": "conv_1", "teacher": "norm_1", "adapter": "linear"}


HINTED = {"hint": {"task": 1.0, "terms": {"mine": HINT}}}


def tiny(tiny_config, arms, **sections):
    """The teacher, and arms of the student with these fields."""
    base = tiny_config()
    fields = {"model": "student", "epochs": 0.5, "learning_rate": 1e-2, "distill": "kd"}
    made = {name: fields | {"teacher": "teacher"} | own for name, own in arms.items()}
    base["arms"] = {"teacher": base["arms"]["teacher"], **made}
    for key, section in sections.items():
        base[key] = {**base.get(key, {}), **section}
    return base


def run(tiny_config, workdir, arms, **sections):
    frozen = config.freeze(tiny(tiny_config, arms, **sections))
    records = experiment.run(frozen, workdir)
    assert [r.status for r in records] == ["ok"] * len(records)
    return {r.arm: r for r in records}


def curve(workdir, arm, seed=0):
    lines = (workdir / arm / str(seed) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


TEACHERS = {
    "both": {"kind": "ensemble", "arms": ("teacher", "second"), "weights": (3.0, 1.0)},
    "alone": {"kind": "ensemble", "arms": ("teacher",), "average": "logit"},
    "itself": {"kind": "moving_average", "decay": 0.5},
    "peer": {"kind": "peer", "model": "student"},
    "moved": {"kind": "shuffled", "arm": "teacher"},
}


@pytest.fixture(scope="module")
def many(tiny_config, tmp_path_factory):
    """One run with every kind of teacher but a file."""
    workdir = tmp_path_factory.mktemp("many")
    arms = {f"by_{name}": {"teacher": name} for name in TEACHERS} | {
        "kd": {},
        "second": {"model": "teacher", "teacher": "", "distill": "", "seed_offset": 7},
        "hinted": {"distill": "hint"},
        "hinted_w4": {"distill": "hint", "init": "kd", "bits": "W4A4"},
        "itself_w4": {"teacher": "kd", "init": "kd", "bits": "W4A4"},
    }
    return workdir, run(tiny_config, workdir, arms, teachers=TEACHERS, distill=HINTED)


@pytest.mark.slow
def test_an_ensemble_of_one_teaches_as_that_one_does(many):
    workdir, _ = many
    for a, b in zip(curve(workdir, "kd"), curve(workdir, "by_alone"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert curve(workdir, "by_both")[3]["kl_loss"] != pytest.approx(
        curve(workdir, "kd")[3]["kl_loss"], rel=1e-3
    )


@pytest.mark.slow
def test_an_offset_seed_is_another_repetition(many):
    workdir, records = many
    own, other = (
        deploy.load_packed(workdir / arm / "0" / "model.safetensors").variables["params"]
        for arm in ("teacher", "second")
    )
    assert np.abs(own["head"]["kernel"] - other["head"]["kernel"]).max() > 0.01
    assert records["second"].value("agreement") < 1


@pytest.mark.slow
def test_nobody_but_the_student_is_packed(many):
    """Neither adapters, nor a peer, nor an average."""
    workdir, records = many
    names = {}
    for arm in ("kd", "hinted", "by_peer", "by_itself"):
        with safe_open(workdir / arm / "0" / "model.safetensors", "np") as file:
            names[arm] = set(file.keys())
    assert names["hinted"] == names["by_peer"] == names["by_itself"] == names["kd"]
    assert len({records[arm].params for arm in names}) == 1
    assert curve(workdir, "hinted")[-1]["mine_loss"] < curve(workdir, "hinted")[0]["mine_loss"]


@pytest.mark.slow
def test_a_peer_starts_from_an_arm_and_teaches_another_when_it_learns_no_more(
    tiny_config, tmp_path
):
    """With a rate of nearly nothing the former peer is still the arm that it started from."""
    teachers = {}
    for name in ("slow", "fast"):
        teachers[f"{name}_peer"] = {"kind": "peer", "model": "student", "init": "kd"}
        teachers[f"former_{name}"] = {"kind": "former_peer", "arm": name}
    arms = {
        "kd": {},
        "slow": {"teacher": "slow_peer", "learning_rate": 1e-9},
        "fast": {"teacher": "fast_peer", "init": "slow", "bits": "W4A4"},
        "by_slow": {"teacher": "former_slow"},
        "by_fast": {"teacher": "former_fast"},
        "by_kd": {"teacher": "kd"},
    }
    run(tiny_config, tmp_path, arms, teachers=teachers)
    for a, b in zip(curve(tmp_path, "by_slow"), curve(tmp_path, "by_kd"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    first = [curve(tmp_path, f"by_{name}")[0]["kl_loss"] for name in ("slow", "fast")]
    assert first[1] != pytest.approx(first[0], rel=1e-2)


@pytest.mark.slow
def test_shuffled_logits_are_those_of_other_examples_of_the_class(tiny_config, many):
    workdir, _ = many
    teachers = {"moved": TEACHERS["moved"]}
    base = tiny(tiny_config, {"by_moved": {"teacher": "moved"}}, teachers=teachers)
    context = Context(config.freeze(base), workdir)
    logits = context.teachers.logits("teacher", 0, "train")
    moved = context.teachers.teaching("by_moved", 0).extra["teacher_logits"]
    labels = Inputs(config.freeze(base)).splits["train"].read(np.arange(len(logits)))["label"]
    assert (np.abs(moved - logits).max(1) > 0).mean() > 0.9
    for label in range(10):
        rows = labels == label
        np.testing.assert_array_equal(np.sort(moved[rows], 0), np.sort(logits[rows], 0))


@pytest.mark.slow
def test_records_say_what_was_transferred(tiny_config, tmp_path):
    sections = {"distill": HINTED, "transfer": {"examples": 64, "pairs": 16}}
    records = run(tiny_config, tmp_path, {"hinted": {"distill": "hint"}}, **sections)
    assert records["teacher"].cka == {}
    found = records["hinted"]
    assert set(found.cka) == {"conv_0", "conv_1", "head"}
    assert set(found.cka["conv_1"]) == {"conv_0", "norm_0", "conv_1", "norm_1", "head"}
    assert all(0 <= v <= 1.000001 for row in found.cka.values() for v in row.values())
    assert -1 <= found.attribution_cosine <= 1
    assert 0 <= found.path_agreement <= 1
    assert 0 <= found.adversarial_agreement <= 1
    assert len(found.accuracy_by_class) == 10
    assert found.top5_accuracy >= found.value("accuracy")
    assert found.ece > 0


@pytest.mark.slow
def test_every_seed_is_compared_with_its_own_teacher_asked_once(tiny_config, tmp_path, monkeypatch):
    made = []

    class Counted(transfer.Comparison):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(transfer, "Comparison", Counted)
    sections = {"transfer": {"examples": 64, "pairs": 16}}
    arms = {name: {"distill": "", "teacher": ""} for name in ("one", "two")}
    arms["two"]["learning_rate"] = 1e-3
    frozen = config.freeze({**tiny(tiny_config, arms, **sections), "seeds": (0, 1)})
    records = {(r.arm, r.seed): r for r in experiment.run(frozen, tmp_path)}
    assert len(made) == 2
    images = Inputs(frozen).split("test", 64)[0]["image"]
    for seed in (0, 1):
        # The files of float arms hold exactly what was compared.
        networks = {
            arm: transfer.Predictor(
                network=packed.network.module,
                weights=quantize.Weights(variables=packed.variables, qparams={}),
            )
            for arm in ("teacher", "one", "two")
            for packed in [deploy.load_packed(tmp_path / arm / str(seed) / "model.safetensors")]
        }
        probes = made[0][3]  # of the task
        again = transfer.Comparison(networks["teacher"], images, frozen.transfer, probes)
        for arm in ("one", "two"):
            record = records[arm, seed]
            for key, value in again.measure(networks[arm]).items():
                if key != "cka":
                    assert getattr(record, key) == pytest.approx(value, abs=1e-6), (arm, seed, key)
    taught = [record for (arm, _), record in records.items() if arm != "teacher"]
    assert len({record.attribution_cosine for record in taught}) == 4


@pytest.mark.slow
def test_a_packed_teacher_is_the_arm_it_was_packed_from(tiny_config, many, tmp_path):
    workdir, _ = many
    path = workdir / "teacher" / "0" / "model.safetensors"
    run(
        tiny_config,
        tmp_path,
        {"kd": {"teacher": "file"}},
        teachers={"file": {"kind": "packed", "path": str(path)}},
    )
    for a, b in zip(curve(tmp_path, "kd"), curve(workdir, "kd"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_a_loaded_arm_is_the_one_that_was_packed(tiny_config, many, tmp_path):
    """A network trained elsewhere teaches, is calibrated and is trained on as if trained here."""
    workdir, records = many
    base = tiny(tiny_config, {"kd": {}})
    path = str(workdir / "teacher" / "0" / "model.safetensors")
    base["arms"]["teacher"] = {"model": "teacher", "load": path}
    base["arms"]["ptq"] = {"model": "teacher", "init": "teacher", "bits": "W8"}
    base["arms"]["more"] = {"model": "teacher", "load": path, "epochs": 0.2}
    found = {r.arm: r for r in experiment.run(config.freeze(base), tmp_path)}
    assert found["teacher"].value("nll") == pytest.approx(records["teacher"].value("nll"), rel=1e-6)
    assert found["kd"].value("nll") == pytest.approx(records["kd"].value("nll"), rel=1e-4)
    assert 0.9 < found["ptq"].value("agreement") < 1.0 or found["ptq"].value("kl_to_teacher") > 0
    assert found["more"].value("nll") != found["teacher"].value("nll")
    base["arms"]["wrong"] = {"model": "student", "load": path}
    with pytest.raises(ConfigError, match=r"arms\.wrong\.load=.*but the arm's model is"):
        experiment.run(config.freeze(base), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "augment", [pytest.param((), marks=pytest.mark.slow), ({"name": "shift", "pixels": 1},)]
)
def test_a_cache_on_disk_gives_the_losses_of_a_live_teacher(tiny_config, tmp_path, augment):
    arms = {"kd": {}, "again": {}}
    for kind in ("none", "dense"):
        run(
            tiny_config,
            tmp_path / kind,
            arms if kind == "dense" else {"kd": {}},
            cache={"kind": kind},
            data={"augment": augment},
        )
    caches = list((tmp_path / "dense" / "teacher" / "0" / "caches").iterdir())
    assert len(caches) == 1  # both arms read it
    live, cached = (curve(tmp_path / kind, "kd") for kind in ("none", "dense"))
    assert len(live) > 5
    for a, b in zip(live, cached, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "size"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in [("top_k", 10), ("sampled", 400)]],
)
def test_a_sparse_cache_of_everything_teaches_as_the_dense_one(tiny_config, tmp_path, kind, size):
    """All classes, or very many draws: the first step's gradient is that of the dense loss."""
    term = {"loss": f"{kind}_kl", "weight": 0.7, "temperature": 2.0}
    run(tiny_config, tmp_path / "dense", {"kd": {}})
    run(
        tiny_config,
        tmp_path / kind,
        {"kd": {"distill": "sparse"}},
        distill={"sparse": {"task": 0.3, "terms": {"kl": term}}},
        cache={"kind": kind, "size": size, "temperature": 2.0},
    )
    dense, sparse = curve(tmp_path / "dense", "kd")[0], curve(tmp_path / kind, "kd")[0]
    assert sparse["task_loss"] == pytest.approx(dense["task_loss"], rel=1e-5)
    tolerance = 1e-4 if kind == "top_k" else 0.05
    assert sparse["grad_norm"] == pytest.approx(dense["grad_norm"], rel=tolerance)


@pytest.mark.parametrize(
    ("arm", "sections", "words"),
    [
        (
            {"distill": "h"},
            {"distill": {"h": {"terms": {"t": HINT | {"student": "conv_9"}}}}},
            ["config.distill.h, arm 'kd'", "layer of the student", "'conv_9'", "conv_1"],
        ),
        (
            {"distill": "h"},
            {"distill": {"h": {"terms": {"t": HINT | {"teacher": "norm_9"}}}}},
            ["layer of the teacher", "'norm_9'", "norm_1"],
        ),
        (
            {"distill": "h"},
            {"distill": {"h": {"terms": {"t": {"loss": "hnt"}}}}},
            ["config.distill.h.terms.t.loss", "'hint'?"],
        ),
        (
            {"distill": "h", "teacher": "peer"},
            {
                "distill": {"h": {"terms": {"t": HINT}}},
                "teachers": {"peer": {"kind": "peer", "model": "student"}},
            },
            ["config.distill.h looks at layers", "config.teachers.peer"],
        ),
        (
            {},
            {"cache": {"kind": "top_k", "size": 3}},
            ["terms.kl (kl) needs ['teacher_logits']", "'top_k'", "teacher_indices"],
        ),
        (
            {},
            {"data": {"augment": ({"name": "shift", "pixels": 1},)}},
            ["config.arms.kd.augment=True", "config.cache.kind"],
        ),
        (
            {"teacher": "file"},
            {"teachers": {"file": {"kind": "packed", "path": "nowhere.safetensors"}}},
            ["config.teachers.file.path='nowhere.safetensors'", "No such file"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_trains(
    tiny_config, tmp_path, arm, sections, words
):
    with pytest.raises(ConfigError) as error:
        experiment.run(config.freeze(tiny(tiny_config, {"kd": arm}, **sections)), tmp_path / "run")
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"
    assert not (tmp_path / "run").exists()
