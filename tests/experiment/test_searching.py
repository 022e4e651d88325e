"""Arms whose bits are searched, from end to end on digits."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
from compilations import count_compilations
from scipy.special import log_softmax

from kdq import config, data, deploy, experiment, files
from kdq.config import ConfigError
from kdq.experiment import inputs as inputs_module
from kdq.experiment import searching, training
from kdq.experiment.context import Context
from kdq.experiment.searching import SearchResult
from kdq.quantize.layers import layer_bits
from kdq.quantize.network import Weights
from kdq.search import bank, evaluate
from kdq.search.cost import load
from kdq.train import loop

EXAMPLES = 150  # of validation: a whole batch, and part of the next
TAUGHT = {"teacher": "teacher", "distill": "kd"}


def searched(**fields):
    return {
        "method": "random",
        "students": ("wide",),
        "teacher": "teacher",
        "choices": ("W2A8", "W4A8", "W8A8"),
        "most": {"average_bits": 4.0},
        "evaluations": 8,
        "examples": EXAMPLES,
        **fields,
    }


@pytest.fixture(scope="module")
def make(tiny_config):
    """Makes the config of an experiment with these searches, each with two arms."""

    def make(searches=None, *, qad=True, **changes):
        fields = tiny_config() | {"ptq": {}, "qat": {}}
        fields["quantize"] = {"calibration_examples": 128}
        fields["models"]["narrow"] = {"name": "cnn", "num_classes": 10, "widths": (3, 4)}
        fields["arms"] = {
            "teacher": fields["arms"]["teacher"],
            "wide": {"model": "student", "epochs": 1.0, "learning_rate": 1e-2},
            "narrow": {"model": "narrow", "epochs": 1.0, "learning_rate": 1e-2},
        }
        for name, search in (searches or {}).items():
            own = {"model": "student", "init": "wide", "bits": name}
            if search["students"][0] == "narrow":
                own |= {"model": "narrow", "init": "narrow"}
            fields["arms"][f"{name}_ptq"] = own
            if qad:
                fields["arms"][f"{name}_qad"] = {**own, "epochs": 0.3, **TAUGHT}
        return {**fields, "searches": dict(searches or {}), **changes}

    return make


@pytest.fixture(scope="module")
def floats(make, tmp_path_factory):
    """A folder in which all float arms have been run."""
    workdir = tmp_path_factory.mktemp("floats")
    experiment.run(config.freeze(make()), workdir)
    return workdir


class Watcher(experiment.Progress):
    """Notes the searches, and cuts one off at an evaluation."""

    def __init__(self, cut_at=None):
        self.searches, self.counts, self.cut_at = [], [], cut_at

    def search(self, name, seed, evaluations):
        self.searches.append((name, seed, evaluations))

    def evaluated(self, count, best):
        if count == self.cut_at:
            raise KeyboardInterrupt
        self.counts.append(count)


@pytest.fixture(scope="module")
def found(make, floats, tmp_path_factory):
    """`(its config, folder, records by arm, who watched)` of one search and its two arms."""
    workdir = tmp_path_factory.mktemp("found") / "run"
    shutil.copytree(floats, workdir)
    frozen, watcher = config.freeze(make({"four": searched()})), Watcher()
    records = experiment.run(frozen, workdir, progress=watcher)
    return frozen, workdir, {r.arm: r for r in records}, watcher


@pytest.fixture
def folder(floats, found, tmp_path):
    """Float arms and cost tables, and no search."""
    workdir = tmp_path / "run"
    shutil.copytree(floats, workdir)
    shutil.copytree(found[1] / "costs", workdir / "costs")
    return workdir


def evaluations(workdir, name="four"):
    (path,) = (workdir / "searches" / name / "0").glob("evaluations-*.jsonl")
    return [
        files.unseal(json.loads(line)) | {"seconds": 0} for line in path.read_text().splitlines()
    ]


def result(workdir, name="four"):
    """What a search came to, but for the time it took."""
    path = workdir / "searches" / name / "0" / "result.json"
    times = {"seconds": 0, "prepare_seconds": 0, "compile_seconds": 0}
    return files.read_json(path) | times


def bits_of_file(workdir, arm):
    packed = deploy.load_packed(workdir / arm / "0" / "model.safetensors")
    of = lambda path: {
        **packed.weight_quantizers.get(path, {}),
        **packed.qparams.get(path, {}),
    }
    return {path: layer_bits({path: of(path)}, path) for path in packed.variables["params"]}


# What is found, and what becomes of it.


def test_both_arms_have_the_bits_that_were_found(found):
    _, workdir, records, _ = found
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


def test_two_arms_share_one_search(found):
    _, workdir, records, watcher = found
    assert watcher.searches == [("four", 0, 8)]
    assert watcher.counts == list(range(1, 9))
    assert records["four_ptq"].search == records["four_qad"].search
    log = evaluations(workdir)
    best = min(log, key=lambda line: line["scores"]["kl"])
    assert result(workdir)["chosen"] == best["chosen"]
    assert result(workdir)["scores"] == best["scores"]
    assert len({tuple(line["policy"]) for line in log}) > 3


def test_the_score_is_that_of_the_arms_file_on_validation(found):
    """The first examples, logits of the packed files, divergence in NumPy."""
    frozen, workdir, records, _ = found
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


def test_what_was_found_is_read_again(found):
    frozen, workdir, records, _ = found
    copied = workdir.parent / "again"
    shutil.copytree(workdir, copied)
    shutil.rmtree(copied / "four_ptq")
    watcher = Watcher()
    again = {r.arm: r for r in experiment.run(frozen, copied, progress=watcher)}
    assert watcher.searches == []
    assert again["four_ptq"].search == records["four_ptq"].search
    assert again["four_ptq"].value("accuracy") == records["four_ptq"].value("accuracy")


def test_another_config_in_the_same_folder_is_refused(found, make):
    _, workdir, _, _ = found
    changed = config.freeze(make({"four": searched(evaluations=9)}))
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
def test_a_search_that_was_cut_off_comes_to_the_same(found, folder, cut_at):
    frozen, workdir, records, _ = found
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
def test_a_search_never_sees_test_data(make, folder, trap, steps):
    how = {"method": "knapsack", "evaluations": 14} if not steps else {"evaluations": 2}
    search = searched(**how, steps=steps, finetune="four_qad" if steps else "")
    # The arm that policies are finetuned as can't be one that waits for them.
    fields = make({"four": search}, qad=False)
    fields["arms"]["trained"] = {"model": "student", "init": "wide", "epochs": 0.2, "bits": "W4A8"}
    fields["arms"]["trained"] |= TAUGHT
    if steps:
        fields["searches"]["four"] |= {"finetune": "trained"}
    records = experiment.run(config.freeze(fields), folder, arms=["four_ptq"])
    assert [r.status for r in records] == ["ok"] * len(records)
    assert trap["read"]  # the arm was measured on it, afterwards


def test_the_trap_is_one(make, folder, trap, monkeypatch):
    """A search that evaluates policies on the test split is caught."""
    split_of = inputs_module.Inputs.split

    def cheating(self, name, size=None, *, limit=None, **options):
        searching = name == "validation" and limit is not None
        return split_of(self, "test" if searching else name, size, limit=limit, **options)

    monkeypatch.setattr(inputs_module.Inputs, "split", cheating)
    with pytest.raises(Trapped):
        experiment.run(config.freeze(make({"four": searched()})), folder, arms=["four_ptq"])


# After a short training.


@pytest.fixture
def trained(make):
    """Makes an experiment whose policies are finetuned by a recipe with two terms."""

    def trained(terms=("kl", "soft"), distilled=("soft",), **fields):
        both = {
            "kl": {"loss": "kl", "weight": 0.7, "temperature": 2.0},
            "soft": {"loss": "hard_label", "weight": 2.0},
        }
        search = searched(steps=2, evaluations=3, distilled=distilled, finetune="qad", **fields)
        made = make({"tuned": search}, qad=False)
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
    (found,) = score([(0, 1, 1, 1, 1)])
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
        assert found[objective] == pytest.approx(value, rel=1e-4)


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


# Several students.


@pytest.mark.parametrize(
    ("limit", "tried"),
    [
        pytest.param(1.0, {"wide", "narrow"}, id="all", marks=pytest.mark.slow),
        pytest.param(0.55, {"narrow"}, id="little", marks=pytest.mark.slow),
    ],
)
def test_bits_and_width_share_a_budget(make, folder, limit, tried):
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
    fields = make({"four": search}, qad=False)
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


def test_an_infeasible_budget_fails_its_arms_alone(make, folder):
    searches = {
        "none": searched(most={"average_bits": 1.5}),
        "size": searched(most={"size": 100.0}, method="uniform"),
        "four": searched(method="uniform", most={"activation_memory": 400.0}),
    }
    records = experiment.run(config.freeze(make(searches, qad=False)), folder)
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
    again = experiment.run(config.freeze(make(enough, qad=False)), folder, arms=["size_ptq"])[-1]
    assert again.status == "ok"
    assert again.search["measured"]["size"] <= named
    assert again.size_bytes <= named
    assert set(again.policy.values()) == {"W2A8"}


@pytest.mark.slow
def test_a_cost_table_is_used_if_it_fits(make, folder, found, tmp_path):
    """One that says that the head is free, whatever its bits."""
    (path,) = (found[1] / "costs").glob("student-*.json")
    table = load(path, device="any", other_device=True)
    size = table.metrics["size"]
    layers = {**size.layers, "head": dict.fromkeys(size.layers["head"], -1e4)}
    free = dataclasses.replace(size, layers=layers)
    changed = dataclasses.replace(table, metrics={**table.metrics, "size": free})
    changed.save(tmp_path / "free.json")
    search = searched(cost_tables=(str(tmp_path / "free.json"),), method="uniform")
    shutil.rmtree(folder / "costs")
    fields = make({"four": search}, qad=False)
    record = experiment.run(config.freeze(fields), folder, arms=["four_ptq"])[-1]
    assert record.search["costs"]["size"] < 0
    assert not (folder / "costs").exists()
    # Of another network it is not: one is made here.
    search = searched(
        cost_tables=(str(tmp_path / "free.json"),), method="uniform", students=("narrow",)
    )
    fields = make({"other": search}, qad=False)
    record = experiment.run(config.freeze(fields), folder, arms=["other_ptq"])[-1]
    assert record.search["costs"]["size"] > 0
    assert len(list((folder / "costs").glob("narrow-*.json"))) == 1


# Mistakes.

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
def test_a_mistake_is_told_before_anything_runs(make, tmp_path, mistake):
    fields, message = MISTAKES[mistake]
    changed = make({"four": searched()})
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
def test_arms_and_searches_that_do_not_fit_each_other(make, change, message):
    changed = make({"four": searched()})
    change(changed)
    with pytest.raises(ConfigError, match=message):
        config.freeze(changed)


def test_too_few_evaluations_for_sensitivities_say_how_many_those_take(make, folder):
    search = searched(method="knapsack", evaluations=5)
    frozen = config.freeze(make({"four": search}, qad=False))
    with pytest.raises(ConfigError, match=r"four\.evaluations=5: sensitivities alone take 10"):
        experiment.run(frozen, folder, arms=["four_ptq"])


def test_a_changed_recipe_is_another_search(trained):
    """All that a finetune goes by is in the digest of the search; what does not matter is not."""
    from kdq.experiment import plan  # noqa: PLC0415

    def digest(change=lambda fields: None):
        fields = trained()
        change(fields)
        frozen = config.freeze(fields)
        return plan.search_digest(frozen, "tuned", plan.digests(frozen))

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
