"""Arms whose bits are searched, from end to end on digits."""

import dataclasses
import shutil

import numpy as np
import pytest
from scipy.special import log_softmax
from searches import EXAMPLES, TAUGHT, Watcher, bits_of_file, evaluations, result, searched

from kdq import config, data, deploy, experiment
from kdq.config import ConfigError
from kdq.experiment import inputs as inputs_module
from kdq.experiment import searching
from kdq.search import bank
from kdq.search.cost import load

# What is found, and what becomes of it.


def test_both_arms_have_the_bits_that_were_found(finished_search):
    _, workdir, records, _ = finished_search
    assert {record.status for record in records.values()} == {"ok"}
    policy = records["four_ptq"].policy
    assert set(policy) == {"conv_0", "conv_1", "head"}
    assert records["four_qad"].policy == policy
    wanted = {path: bank.bits_of(bits) for path, bits in policy.items()}
    for arm in ("four_ptq", "four_qad"):
        assert bits_of_file(workdir, arm) == wanted
    assert records["four_qad"].kind == "QAD"
    counts = {"conv_0": 36, "conv_1": 216, "head": 60}
    average = sum(counts[path] * wanted[path][0] for path in counts) / sum(counts.values())
    assert average <= 4
    told = records["four_ptq"].search
    assert told["costs"]["average_bits"] == pytest.approx(average)
    assert told["costs"]["bops"] == records["four_ptq"].bops == records["four_qad"].bops
    size = (workdir / "four_ptq" / "0" / "model.safetensors").stat().st_size
    assert told["costs"]["size"] == pytest.approx(size, abs=128)


def test_two_arms_share_one_search(finished_search):
    _, workdir, records, watcher = finished_search
    assert watcher.searches == [("four", 0, 8)]
    assert watcher.counts == list(range(1, 9))
    assert records["four_ptq"].search == records["four_qad"].search
    log = evaluations(workdir)
    best = min(log, key=lambda line: line["scores"]["kl"])
    assert result(workdir)["chosen"] == best["chosen"]
    assert result(workdir)["scores"] == best["scores"]
    assert len({tuple(line["policy"]) for line in log}) > 3


def test_the_score_is_that_of_the_arms_file_on_validation(finished_search):
    """The first examples, logits of the packed files, divergence in NumPy."""
    frozen, workdir, records, _ = finished_search
    source = data.open_split("digits", "validation", data_dir=frozen.data.data_dir)
    examples = source.read(np.arange(EXAMPLES))
    images = ((examples["image"].astype(np.float64) - 4.9) / 6.0).astype(np.float32)
    open_file = lambda arm: deploy.load_packed(workdir / arm / "0" / "model.safetensors")
    logits = {
        a: np.asarray(open_file(a)(images), np.float64) for a in ("teacher", "four_ptq", "wide")
    }
    log_p, log_q = log_softmax(logits["teacher"], -1), log_softmax(logits["four_ptq"], -1)
    scores = records["four_ptq"].search["scores"]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    # A number at the edge of two codes may go to either.
    assert scores["kl"] == pytest.approx(kl, rel=2e-2)
    labels = examples["label"]
    assert scores["loss"] == pytest.approx(-log_q[np.arange(EXAMPLES), labels].mean(), rel=5e-3)
    assert scores["error"] == pytest.approx((log_q.argmax(-1) != labels).mean())
    noise = np.square(logits["four_ptq"] - logits["wide"]).sum() / np.square(logits["wide"]).sum()
    assert scores["noise"] == pytest.approx(noise, rel=2e-2)


def test_what_was_found_is_read_again(finished_search):
    frozen, workdir, records, _ = finished_search
    copied = workdir.parent / "again"
    shutil.copytree(workdir, copied)
    shutil.rmtree(copied / "four_ptq")
    watcher = Watcher()
    again = {r.arm: r for r in experiment.run(frozen, copied, progress=watcher)}
    assert watcher.searches == []
    assert again["four_ptq"].search == records["four_ptq"].search
    assert again["four_ptq"].value("accuracy") == records["four_ptq"].value("accuracy")


def test_another_config_in_the_same_folder_is_refused(finished_search, make_config):
    _, workdir, _, _ = finished_search
    changed = config.freeze(make_config({"four": searched(evaluations=9)}))
    with pytest.raises(ConfigError, match=r"four_\w+.*was made with another config"):
        experiment.run(changed, workdir)
    copied = workdir.parent / "without arms"
    shutil.copytree(workdir, copied)
    for arm in ("four_ptq", "four_qad"):
        shutil.rmtree(copied / arm)
    with pytest.raises(ConfigError, match=r"result\.json was found with another config"):
        experiment.run(changed, copied)


# Cut off.


@pytest.mark.slow
@pytest.mark.parametrize("cut_at", [1, 5])
def test_a_search_that_was_cut_off_comes_to_the_same(finished_search, folder, cut_at):
    frozen, workdir, records, _ = finished_search
    with pytest.raises(KeyboardInterrupt):
        experiment.run(frozen, folder, arms=["four_ptq"], progress=Watcher(cut_at))
    assert len(evaluations(folder)) == cut_at
    assert not (folder / "searches" / "four" / "0" / "result.json").exists()
    again = {r.arm: r for r in experiment.run(frozen, folder, arms=["four_ptq"])}
    assert evaluations(folder) == evaluations(workdir)
    assert result(folder) == result(workdir)
    assert again["four_ptq"].value("accuracy") == records["four_ptq"].value("accuracy")


# What a search may see.


class Trapped(Exception):
    """A search looked at test data."""


@pytest.fixture
def trap(monkeypatch):
    """While a search is on, whoever touches the test split is caught; it notes other readers."""
    state = {"on": False, "read": 0}

    class Watched:
        def __init__(self, source):
            self._source = source

        def __getattr__(self, name):
            if state["on"]:
                raise Trapped(name)
            state["read"] += name == "read"
            return getattr(self._source, name)

        def __len__(self):
            if state["on"]:
                raise Trapped("len")
            return len(self._source)

    open_split, search = inputs_module.data.open_split, searching._search

    def watched(name, split, **kwargs):
        source = open_split(name, split, **kwargs)
        return Watched(source) if split == "test" else source

    def during(*args):
        state["on"] = True
        try:
            return search(*args)
        finally:
            state["on"] = False

    monkeypatch.setattr(inputs_module.data, "open_split", watched)
    monkeypatch.setattr(searching, "_search", during)
    return state


@pytest.mark.parametrize("steps", [0, 1])
def test_a_search_never_sees_test_data(make_config, folder, trap, steps):
    how = {"method": "knapsack", "evaluations": 14} if not steps else {"evaluations": 2}
    search = searched(**how, steps=steps, finetune="four_qad" if steps else "")
    # The arm that policies are finetuned as can't be one that waits for them.
    fields = make_config({"four": search}, qad=False)
    fields["arms"]["trained"] = {"model": "student", "init": "wide", "epochs": 0.2, "bits": "W4A8"}
    fields["arms"]["trained"] |= TAUGHT
    if steps:
        fields["searches"]["four"] |= {"finetune": "trained"}
    records = experiment.run(config.freeze(fields), folder, arms=["four_ptq"])
    assert [r.status for r in records] == ["ok"] * len(records)
    assert trap["read"]  # the arm was measured on it, afterwards


def test_the_trap_is_one(make_config, folder, trap, monkeypatch):
    """A search that evaluates policies on the test split is caught."""
    split_of = inputs_module.Inputs.split

    def cheating(self, name, size=None, *, limit=None, **options):
        searching = name == "validation" and limit is not None
        return split_of(self, "test" if searching else name, size, limit=limit, **options)

    monkeypatch.setattr(inputs_module.Inputs, "split", cheating)
    with pytest.raises(Trapped):
        experiment.run(config.freeze(make_config({"four": searched()})), folder, arms=["four_ptq"])


# Several students.


@pytest.mark.parametrize(
    ("limit", "tried"),
    [
        pytest.param(1.0, {"wide", "narrow"}, id="all", marks=pytest.mark.slow),
        pytest.param(0.55, {"narrow"}, id="little", marks=pytest.mark.slow),
    ],
)
def test_bits_and_width_share_a_budget(make_config, folder, limit, tried):
    """A share of what the wider one takes at its most: of little it can only be the narrow one."""
    search = searched(
        method="knapsack",
        sensitivity="noise",
        students=("wide", "narrow"),
        choices=("W4A8", "W8A8"),
        most={},
        share={"weight_memory": limit},
        objective="noise",
        evaluations=20,
    )
    fields = make_config({"four": search}, qad=False)
    record = experiment.run(config.freeze(fields), folder, arms=["four_ptq"])[-1]
    assert record.status == "ok"
    told = record.search
    log = evaluations(folder)
    assert (
        told["chosen"]["student"]
        == min(log, key=lambda e: e["scores"]["noise"])["chosen"]["student"]
    )
    packed = deploy.load_packed(folder / "four_ptq" / "0" / "model.safetensors")
    widths = {"wide": (4, 6), "narrow": (3, 4)}[told["chosen"]["student"]]
    kernels = [packed.variables["params"][f"conv_{i}"]["kernel"].shape[-1] for i in (0, 1)]
    assert tuple(kernels) == widths
    params = {"wide": 36 + 4 + 216 + 6 + 60 + 10, "narrow": 27 + 3 + 108 + 4 + 40 + 10}
    assert record.params == params[told["chosen"]["student"]]
    assert {line["chosen"]["student"] for line in log} == tried
    wanted = {path: bank.bits_of(bits) for path, bits in record.policy.items()}
    assert bits_of_file(folder, "four_ptq") == wanted


# Budgets.


def test_an_infeasible_budget_fails_its_arms_alone(make_config, folder):
    searches = {
        "none": searched(most={"average_bits": 1.5}),
        "size": searched(most={"size": 100.0}, method="uniform"),
        "four": searched(method="uniform", most={"activation_memory": 400.0}),
    }
    records = experiment.run(config.freeze(make_config(searches, qad=False)), folder)
    records = {r.arm: r for r in records}
    assert {arm: r.status for arm, r in records.items() if arm.endswith("ptq")} == {
        "none_ptq": "failed",
        "size_ptq": "failed",
        "four_ptq": "ok",
    }
    message = "arm none_ptq, seed 0: no policy keeps the budgets average_bits <= 1.5; the nearest"
    assert records["none_ptq"].error.startswith(message)
    assert "average_bits <= 2 (" in records["none_ptq"].error
    assert records["four_ptq"].search["costs"]["activation_memory"] == 4 * 64 + 6 * 16
    # And the size that it names is one that there is.
    named = float(records["size_ptq"].error.split("keeps: size <= ")[1].split(" ")[0])
    enough = {"size": searched(most={"size": named}, method="uniform", evaluations=3)}
    shutil.rmtree(folder / "size_ptq")
    for name in ("none", "four"):
        shutil.rmtree(folder / f"{name}_ptq")
    again = experiment.run(
        config.freeze(make_config(enough, qad=False)), folder, arms=["size_ptq"]
    )[-1]
    assert again.status == "ok"
    assert again.search["measured"]["size"] <= named
    assert again.size_bytes <= named
    assert set(again.policy.values()) == {"W2A8"}


@pytest.mark.slow
def test_a_cost_table_is_used_if_it_fits(make_config, folder, finished_search, tmp_path):
    """One that says that the head is free, whatever its bits."""
    (path,) = (finished_search[1] / "costs").glob("student-*.json")
    table = load(path, device="any", other_device=True)
    size = table.metrics["size"]
    layers = {**size.layers, "head": dict.fromkeys(size.layers["head"], -1e4)}
    free = dataclasses.replace(size, layers=layers)
    changed = dataclasses.replace(table, metrics={**table.metrics, "size": free})
    changed.save(tmp_path / "free.json")
    search = searched(cost_tables=(str(tmp_path / "free.json"),), method="uniform")
    shutil.rmtree(folder / "costs")
    fields = make_config({"four": search}, qad=False)
    record = experiment.run(config.freeze(fields), folder, arms=["four_ptq"])[-1]
    assert record.search["costs"]["size"] < 0
    assert not (folder / "costs").exists()
    # Of another network it is not: one is made here.
    search = searched(
        cost_tables=(str(tmp_path / "free.json"),), method="uniform", students=("narrow",)
    )
    fields = make_config({"other": search}, qad=False)
    record = experiment.run(config.freeze(fields), folder, arms=["other_ptq"])[-1]
    assert record.search["costs"]["size"] > 0
    assert len(list((folder / "costs").glob("narrow-*.json"))) == 1
