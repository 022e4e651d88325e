"""Bits by search: what an arm gets whose `bits` names one, searched once a seed and kept."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kdq import config as kdq_config
from kdq import files
from kdq.config import ConfigError, Experiment, Search
from kdq.experiment import costing, plan, training
from kdq.experiment.context import Context
from kdq.experiment.quantized import OBSERVERS, recipe
from kdq.search import bank, evaluate, run, searchers, sensitivity, spaces
from kdq.search.evaluate import Evaluator, Finetune
from kdq.search.measured import Files, choose_finalist
from kdq.search.problem import Policy
from kdq.search.run import History
from kdq.search.searchers import METHODS
from kdq.search.spaces import DISTILLED, Student
from kdq.stopwatch import Stopwatch

FOLDER, COSTS = "searches", "costs"  # in the workdir
RESULT = "result.json"  # of a search
# Fields of a search that its evaluators depend on. Those that differ in method or budget share all
# but that.
EVALUATED = ("teacher", "choices", "fixed", "observer", "examples", "policies_at_once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The policy that a search chose, and the arm that it makes of an arm."""

    name: str
    chosen: Mapping[str, str]  # {"student": arm, layer path: "W4A8", "distill/TERM": "on"}
    observer: str
    description: Mapping[str, Any]  # of the search, for records

    @property
    def layers(self) -> dict[str, str]:
        """{layer path: "W4A8"}."""
        return {
            k: v for k, v in self.chosen.items() if k != "student" and not k.startswith(DISTILLED)
        }

    @property
    def record(self) -> dict[str, Any]:
        """Fields of the record of an arm."""
        return {"policy": self.layers, "search": self.description}

    def applied(self, experiment: Experiment, name: str) -> Experiment:
        """Returns the experiment in which the arm `name` has this policy."""
        student = experiment.arms[self.chosen["student"]]
        arm = dataclasses.replace(
            experiment.arms[name], init=self.chosen["student"], model=student.model
        )
        left_out = {k.removeprefix(DISTILLED) for k, v in self.chosen.items() if v == "off"}
        distill = dict(experiment.distill)
        if arm.distill and left_out:
            whole = distill[arm.distill]
            terms = {k: v for k, v in whole.terms.items() if k not in left_out}
            distill[arm.distill] = dataclasses.replace(whole, terms=terms)
        rules = {**experiment.rules, self.name: bank.to_rules(self.layers, self.observer)}
        return dataclasses.replace(
            experiment, arms={**experiment.arms, name: arm}, rules=rules, distill=distill
        )


def result(context: Context, name: str, seed: int) -> SearchResult:
    """Returns the result of a search with a seed: read if it was done before."""
    experiment, folder = context.experiment, _folder(context, name, seed)
    search, path = experiment.searches[name], folder / RESULT
    digest = plan.search_digest(experiment, name, context.store.digests)
    if not path.is_file():
        log = folder / f"evaluations-{digest}.jsonl"
        fields = {"digest": digest, **_search(context, name, seed, log)}
        files.write_json(path, fields)
    fields = files.read_json(path)
    fields = dict(fields) if isinstance(fields, Mapping) else {}
    if not isinstance(fields.get("chosen"), Mapping) or not isinstance(fields.get("digest"), str):
        raise ConfigError(f"{path} is no result of a search: delete {folder} to search again")
    if fields.pop("digest") != digest:
        raise ConfigError(
            f"{path} was found with another config: choose another workdir, or delete {folder}"
        )
    chosen, description = fields["chosen"], {"name": name, **fields}
    baseline = plan.baseline_of(experiment, name)
    if baseline and (_folder(context, baseline, seed) / RESULT).is_file():
        other = result(context, baseline, seed)
        keys = ("name", "chosen", "scores", "costs", "measured")
        uniform = {key: other.description[key] for key in keys}
        description["uniform"] = {**uniform, "same": dict(other.chosen) == dict(chosen)}
    return SearchResult(name=name, chosen=chosen, observer=search.observer, description=description)


def _folder(context: Context, name: str, seed: int) -> Path:
    return context.store.workdir / FOLDER / name / str(seed)


def _search(context: Context, name: str, seed: int, log: Path) -> dict[str, Any]:
    """Searches; returns the fields of the result."""
    watch, search = Stopwatch(), context.experiment.searches[name]
    students = [prepare_student(context, search, arm, seed) for arm in search.students]
    used = sum(student.evaluations for student in students)
    networks = [student.network for student in students]
    limits = spaces.limits_of(networks, search.most.set, search.share.set)
    problem = spaces.make_problem(networks, limits, search.distilled)
    left = search.evaluations - used
    if left < 1:
        raise ConfigError(
            f"config.searches.{name}.evaluations={search.evaluations}: sensitivities alone "
            f"take {used}"
        )
    searcher = searchers.make(search.method, problem, seed=seed, evaluations=left, **search.options)
    context.progress.search(name, seed, left)
    prepared = watch.working
    with History(log) as history:
        evaluated = run.run(
            problem,
            searcher,
            scorer(context, search, students, seed),
            history,
            objective=search.objective,
            evaluations=left,
            at_once=1 if search.steps else students[0].evaluator.at_once,
            on_evaluated=lambda count, best: context.progress.evaluated(
                count, f"{search.objective} {best.scores[search.objective]:.4g}"
            ),
        )
    costs = [network.costs for network in networks]
    best, measured = choose_finalist(problem, evaluated, search, [s.files for s in students], costs)
    chosen = best.policy[0]
    choices = students[chosen].files.choose(best.policy)
    return {
        "method": search.method,
        "chosen": dict(best.chosen),
        "objective": search.objective,
        "scores": dict(best.scores),
        "costs": {m: costs[chosen].total(m, choices) for m in costs[chosen].metrics},
        "measured": measured,
        "limits": limits,
        "sensitivity_evaluations": used,
        "evaluations": len(evaluated),
        "prepare_seconds": prepared,
        "seconds": evaluated[-1].seconds,
        "compile_seconds": watch.compiling,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedStudent:
    """A student of a search with all that policies are judged by."""

    network: Student
    evaluator: Evaluator
    files: Files
    evaluations: int  # that sensitivities took


def prepare_student(context: Context, search: Search, name: str, seed: int) -> PreparedStudent:
    """Returns a student calibrated at every choice, with its costs and sensitivities."""
    needs, key = METHODS[search.method].needs, context.experiment.arms[name].model
    digest = kdq_config.digest([[getattr(search, f) for f in EVALUATED], list(search.fixed)])
    known = name, seed, digest
    evaluator = context.once(
        "evaluator", known, lambda: _make_evaluator(context, search, name, seed)
    )
    student = Student(
        name=name,
        layers=context.layers(key),
        choices=evaluator.choices,
        costs=costing.table(context, key, search, evaluator.choices),
    )
    used, measure = 0, search.sensitivity

    def counted(measured: Any) -> tuple[Any, int]:
        """Returns what is measured and how many evaluations that took."""
        before = evaluator.evaluations
        return measured(), evaluator.evaluations - before

    if "sensitivity" in needs or "pairs" in needs:
        (table, base), count = context.once(
            "sensitivity",
            (*known, measure),
            lambda: counted(lambda: sensitivity.measure(measure, evaluator)),
            most=16,
        )
    if "sensitivity" in needs:
        student, used = dataclasses.replace(student, sensitivity=tuple(table), base=base), count
    if "pairs" in needs:
        pairs, count = context.once(
            "pairs",
            (*known, measure),
            lambda: counted(lambda: sensitivity.pairs(measure, evaluator, tuple(table), base)),
        )
        student, used = dataclasses.replace(student, pairs=pairs), used + count
    model_files = Files(
        evaluator.network,
        evaluator.variables,
        evaluator.choices,
        evaluator.bank,
        context.example,
        kdq_config.to_json(context.experiment.models[key]),
    )
    return PreparedStudent(
        network=student, evaluator=evaluator, files=model_files, evaluations=used
    )


def _make_evaluator(context: Context, search: Search, name: str, seed: int) -> Evaluator:
    """Returns the evaluator of a student, calibrated at every choice, on held-out examples."""
    model, variables = context.model(name), context.store.weights(name, seed)
    layers = context.layers(context.experiment.arms[name].model)
    choices = costing.choices_of(search, layers, "config.search")
    size = min(search.examples, context.experiment.data.eval_batch_size)
    batches = context.inputs.split("validation", size, limit=search.examples)
    teacher = context.teachers.logits(search.teacher, seed, "validation")
    quantizers = bank.fill(
        model,
        variables,
        choices,
        context.inputs.calibration_batches(),
        OBSERVERS[search.observer],
        progress=context.progress.method,
    )
    at_once = search.policies_at_once or (1 if jax.default_backend() == "cpu" else 16)
    return Evaluator(
        network=model,
        task=context.task,
        variables=variables,
        choices=choices,
        bank=quantizers,
        held=evaluate.hold_out(model, variables, context.task, batches, teacher),
        at_once=at_once,
    )


def scorer(
    context: Context, search: Search, students: Sequence[PreparedStudent], seed: int
) -> run.Score:
    """Returns a function of policies to scores: by calibration alone, or after a short training."""
    if search.steps:
        return _finetuning_scorer(context, search, students, seed)

    def score(policies: Sequence[Policy]) -> list[Mapping[str, float]]:
        scores: dict[Policy, Mapping[str, float]] = {}
        for s, student in enumerate(students):
            batch = [policy for policy in policies if policy[0] == s]
            if batch:
                columns = student.evaluator([policy[1:] for policy in batch])
                for i, policy in enumerate(batch):
                    scores[policy] = {key: float(column[i]) for key, column in columns.items()}
        return [scores[policy] for policy in policies]

    return score


def _finetuning_scorer(
    context: Context, search: Search, students: Sequence[PreparedStudent], seed: int
) -> run.Score:
    experiment, name = context.experiment, search.finetune
    teaching = context.teachers.teaching(name, seed)
    finetunes = [
        Finetune(
            evaluator=student.evaluator,
            begin=functools.partial(
                training.make_plan,
                experiment,
                name,
                seed,
                model=student.evaluator.network.module,
                inputs=context.inputs,
                teaching=teaching,
                steps=search.steps,
            ),
            method=recipe(experiment, experiment.arms[name]).method,
            distilled=search.distilled,
        )
        for student in students
    ]
    count = len(students[0].evaluator.choices)

    def score(policies: Sequence[Policy]) -> list[Mapping[str, float]]:
        return [
            finetunes[policy[0]](
                policy[1 : count + 1], [bool(kept) for kept in policy[count + 1 :]]
            )
            for policy in policies
        ]

    return score
