"""Bits by search: what an arm gets whose `bits` names one, found once a seed and kept."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import config as kdq_config
from kdq import files, quantize
from kdq.config import ConfigError, Experiment, Search
from kdq.deploy import extras
from kdq.experiment import costing, plan, training
from kdq.experiment.found import Found
from kdq.experiment.inputs import Inputs
from kdq.experiment.progress import Progress
from kdq.experiment.quantized import OBSERVERS, recipe
from kdq.experiment.store import Store
from kdq.experiment.teaching import Teachers
from kdq.fields import check_arguments
from kdq.search import bank, evaluate, run, sensitivity, spaces
from kdq.search.evaluate import Evaluator
from kdq.search.finalists import choose
from kdq.search.finetune import Finetune
from kdq.search.history import History
from kdq.search.measured import Files
from kdq.search.problem import Policy
from kdq.search.searchers import METHODS
from kdq.search.spaces import Student
from kdq.stopwatch import Stopwatch
from kdq.train.optimizer import make_optimizer

FOLDER, COSTS = "searches", "costs"  # in the workdir
RESULT = "result.json"  # of a search
GIVEN = ("problem", "seed", "evaluations")  # to every searcher; the rest of its arguments: options


class Searches:
    """The searches of an experiment."""

    def __init__(
        self,
        experiment: Experiment,
        models: dict[str, nn.Module],
        store: Store,
        inputs: Inputs,
        teachers: Teachers,
        progress: Progress,
    ):
        self._experiment, self._models = experiment, models
        self._store, self._inputs, self._teachers = store, inputs, teachers
        self._progress = progress
        self.of = functools.lru_cache(maxsize=None)(self._of)
        # Searches of a seed that differ in method or budget share all but that.
        self._evaluator = functools.lru_cache(maxsize=4)(self._make_evaluator)
        self._sensitivity = functools.lru_cache(maxsize=16)(self._measure_sensitivity)
        self._pairs = functools.lru_cache(maxsize=4)(self._measure_pairs)

    def check(self, arms: Sequence[str]) -> None:
        """Raises ConfigError for what the searches of these arms say that can't be done."""
        method = self._experiment.search.method  # of launch/search.py, whatever runs now
        if method not in METHODS:
            raise ConfigError(kdq_config.unknown("config.search.method:", method, METHODS))
        for name in dict.fromkeys(self._experiment.arms[arm].bits for arm in arms):
            if name in self._experiment.searches:
                self._check(name, self._experiment.searches[name])

    def _check(self, name: str, search: Search) -> None:
        where = f"config.searches.{name}"
        if search.method not in METHODS:
            raise ConfigError(kdq_config.unknown(f"{where}.method:", search.method, METHODS))
        try:
            extras.load("search", *getattr(METHODS[search.method], "libraries", ()))
        except ImportError as error:
            raise ConfigError(f"{where}.method={search.method!r}: {error}") from error
        check_arguments(METHODS[search.method], (*GIVEN, *search.options), f"{where}.options")
        for field, valid in (
            ("objective", evaluate.OBJECTIVES),
            ("sensitivity", sensitivity.MEASURES),
            ("observer", OBSERVERS),
        ):
            if getattr(search, field) not in valid:
                given = getattr(search, field)
                raise ConfigError(kdq_config.unknown(f"{where}.{field}:", given, valid))
        if both := search.most.set.keys() & search.share.set.keys():
            raise ConfigError(f"{where}: expected `most` or `share` of {sorted(both)}, not both")
        measures = evaluate.OBJECTIVES if "pairs" in METHODS[search.method].needs else ()
        if measures and search.sensitivity not in measures:
            what = f"{where}.sensitivity of pairs:"
            raise ConfigError(kdq_config.unknown(what, search.sensitivity, measures))
        for student in search.students:
            model = self._models[self._experiment.arms[student].model]
            shapes = costing.shapes(model, self._inputs)
            layers = quantize.list_layers(model, shapes, self._inputs.image)
            costing.check(search, layers, where)
        if search.distilled:
            trained_as = self._experiment.arms[search.finetune].distill
            terms = self._experiment.distill[trained_as].terms if trained_as else ()
            for term in search.distilled:
                if term not in terms:
                    raise ConfigError(kdq_config.unknown(f"{where}.distilled: term", term, terms))

    def _of(self, name: str, seed: int) -> Found:
        """What a search finds with a seed: read if it was done before."""
        search = self._experiment.searches[name]
        digest = plan.search_digest(self._experiment, name, self._store.digests)
        folder = self._folder(name, seed)
        path = folder / RESULT
        if not path.is_file():
            log = folder / f"evaluations-{digest}.jsonl"
            found = {"digest": digest, **self._search(name, search, seed, log)}
            files.write_json(path, found)
        found = _checked(files.read_json(path), path)
        if found.pop("digest") != digest:
            raise ConfigError(
                f"{path} was found with another config: choose another workdir, or delete {folder}"
            )
        told = {"name": name, **found, **self._against_uniform(name, seed, found)}
        return Found(name=name, chosen=found["chosen"], observer=search.observer, told=told)

    def _against_uniform(self, name: str, seed: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the best uniform bits are beside what was found, if they are known."""
        baseline = plan.baseline_of(self._experiment, name)
        if not (baseline and (self._folder(baseline, seed) / RESULT).is_file()):
            return {}
        other = self.of(baseline, seed)
        told = {key: other.told[key] for key in ("name", "chosen", "scores", "costs", "measured")}
        return {"uniform": {**told, "same": dict(other.chosen) == dict(found["chosen"])}}

    def _folder(self, name: str, seed: int) -> Path:
        return self._store.workdir / FOLDER / name / str(seed)

    def _search(self, name: str, search: Search, seed: int, log: Path) -> dict[str, Any]:
        watch = Stopwatch()
        method = METHODS[search.method]
        students = [self._student(search, one, seed, method.needs) for one in search.students]
        used = sum(one.evaluations for one in students)
        networks = [one.student for one in students]
        limits = spaces.limits_of(networks, search.most.set, search.share.set)
        problem = spaces.make_problem(networks, limits, search.distilled)
        left = search.evaluations - used
        if left < 1:
            raise ConfigError(
                f"config.searches.{name}.evaluations={search.evaluations}: sensitivities alone "
                f"take {used}"
            )
        searcher = method(problem, seed=seed, evaluations=left, **search.options)
        self._progress.search(name, seed, left)
        prepared = watch.working
        with History(log) as history:
            done = run.run(
                problem,
                searcher,
                self._scorer(search, students, seed),
                history,
                objective=search.objective,
                evaluations=left,
                at_once=1 if search.steps else students[0].evaluator.at_once,
                on_evaluated=lambda count, best: self._progress.evaluated(
                    count, f"{search.objective} {best.scores[search.objective]:.4g}"
                ),
            )
        best, measured = choose(
            problem,
            done,
            search,
            [one.files for one in students],
            [one.costs for one in networks],
        )
        return {
            "method": search.method,
            "chosen": dict(best.chosen),
            "objective": search.objective,
            "scores": dict(best.scores),
            "costs": {
                metric: networks[best.policy[0]].costs.total(
                    metric, students[best.policy[0]].files.of(best.policy)
                )
                for metric in networks[best.policy[0]].costs.metrics
            },
            "measured": measured,
            "limits": limits,
            "sensitivity_evaluations": used,
            "evaluations": len(done),
            "prepare_seconds": prepared,
            "seconds": done[-1].seconds,
            "compile_seconds": watch.compiling,
        }

    def _student(self, search: Search, name: str, seed: int, needs: Sequence[str]) -> "_Prepared":
        key = self._experiment.arms[name].model
        evaluator = self._evaluator(name, seed, _Held.of(search))
        layers = self._layers(name, seed)
        costs = costing.table(
            self._experiment,
            key,
            search,
            evaluator.choices,
            self._inputs,
            self._store.workdir / COSTS,
            self._progress,
        )
        student = Student(name=name, layers=layers, choices=evaluator.choices, costs=costs)
        used, guide = 0, search.sensitivity
        if "sensitivity" in needs:
            table, base, used = self._sensitivity(name, seed, _Held.of(search), guide)
            student = dataclasses.replace(student, sensitivity=table, base=base)
        if "pairs" in needs:
            pairs, more = self._pairs(name, seed, _Held.of(search), guide)
            student, used = dataclasses.replace(student, pairs=pairs), used + more
        own = Files(
            evaluator.model,
            evaluator.variables,
            evaluator.choices,
            evaluator.bank,
            self._inputs.batches("train", size=1)[0]["image"],
            kdq_config.to_json(self._experiment.models[key]),
        )
        return _Prepared(student=student, evaluator=evaluator, files=own, evaluations=used)

    def _layers(self, name: str, seed: int) -> dict[str, quantize.LayerInfo]:
        model = self._models[self._experiment.arms[name].model]
        variables = self._store.weights(name, seed)
        return quantize.list_layers(model, variables, self._inputs.image)

    def _make_evaluator(self, name: str, seed: int, how: "_Held") -> Evaluator:
        """Of a student: calibrated at every choice, with the held-out examples."""
        model = self._models[self._experiment.arms[name].model]
        variables = self._store.weights(name, seed)
        choices = costing.choices_of(how, self._layers(name, seed), "config.search")
        batches = self._held_out(how.examples)
        teacher = self._teachers.logits(how.teacher, seed, "validation")
        quantizers = bank.fill(
            model,
            variables,
            choices,
            self._inputs.calibration_images(),
            OBSERVERS[how.observer],
            progress=self._progress.method,
        )
        at_once = how.policies_at_once or (1 if jax.default_backend() == "cpu" else 16)
        return Evaluator(
            model=model,
            variables=variables,
            choices=choices,
            bank=quantizers,
            held=evaluate.hold(model, variables, batches, teacher),
            at_once=at_once,
        )

    def _held_out(self, examples: int) -> list[Mapping[str, np.ndarray]]:
        """The first examples of the validation split, in batches of one shape."""
        most = self._experiment.data.eval_batch_size
        batches = self._inputs.batches("validation", size=min(examples, most))
        size = len(batches[0]["label"])
        found = []
        for i in range(min(len(batches), -(-examples // size))):
            batch = dict(batches[i])
            counts = np.arange(i * size, (i + 1) * size) < examples
            found.append({**batch, "mask": batch["mask"] * counts})
        return found

    def _measure_sensitivity(self, name: str, seed: int, how: "_Held", measure: str):
        evaluator = self._evaluator(name, seed, how)
        before = evaluator.evaluations
        table, base = sensitivity.measure(measure, evaluator)
        return tuple(table), base, evaluator.evaluations - before

    def _measure_pairs(self, name: str, seed: int, how: "_Held", measure: str):
        evaluator = self._evaluator(name, seed, how)
        table, base, _ = self._sensitivity(name, seed, how, measure)
        before = evaluator.evaluations
        return (
            sensitivity.pairs(measure, evaluator, table, base),
            evaluator.evaluations - before,
        )

    def _scorer(self, search: Search, students: Sequence["_Prepared"], seed: int) -> run.Score:
        """Policies -> scores: by calibration alone, or after a short training each."""
        if search.steps:
            return self._finetunes(search, students, seed)

        def score(policies: Sequence[Policy]) -> list[Mapping[str, float]]:
            found: dict[Policy, Mapping[str, float]] = {}
            for s, one in enumerate(students):
                own = [policy for policy in policies if policy[0] == s]
                if own:
                    scores = one.evaluator([policy[1:] for policy in own])
                    for i, policy in enumerate(own):
                        found[policy] = {k: float(v[i]) for k, v in scores.items()}
            return [found[policy] for policy in policies]

        return score

    def _finetunes(self, search: Search, students: Sequence["_Prepared"], seed: int) -> run.Score:
        experiment, name = self._experiment, search.finetune
        teaching = self._teachers.of(name, seed)
        optimizer = make_optimizer(experiment.optimizer)
        method = recipe(experiment, experiment.arms[name]).method
        finetunes = [
            Finetune(
                evaluator=one.evaluator,
                begin=functools.partial(
                    training.begin,
                    experiment,
                    name,
                    seed,
                    model=one.evaluator.model,
                    inputs=self._inputs,
                    teaching=teaching,
                    optimizer=optimizer,
                    validate=lambda weights: {},
                    steps=search.steps,
                ),
                method=method,
                distilled=search.distilled,
            )
            for one in students
        ]

        def score(policies: Sequence[Policy]) -> list[Mapping[str, float]]:
            count = len(students[0].evaluator.choices)
            return [
                finetunes[policy[0]](
                    policy[1 : count + 1], [bool(kept) for kept in policy[count + 1 :]]
                )
                for policy in policies
            ]

        return score


def _checked(found: Any, path: Path) -> dict[str, Any]:
    """The result of a search as it was read. Raises ConfigError for what is none."""
    fields = found if isinstance(found, Mapping) else {}
    chosen = fields.get("chosen")
    if not isinstance(chosen, Mapping) or not isinstance(fields.get("digest"), str):
        raise ConfigError(f"{path} is no result of a search: delete {path.parent} to search again")
    return dict(fields)


@dataclasses.dataclass(frozen=True)
class _Held:
    """What of a search decides what its policies are evaluated with."""

    teacher: str
    choices: tuple[str, ...]
    fixed_items: tuple[tuple[str, str], ...]
    observer: str
    examples: int
    policies_at_once: int

    @staticmethod
    def of(search: Search) -> "_Held":
        return _Held(
            search.teacher,
            search.choices,
            tuple(search.fixed.items()),
            search.observer,
            search.examples,
            search.policies_at_once,
        )

    @property
    def fixed(self) -> dict[str, str]:
        return dict(self.fixed_items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    student: Student
    evaluator: Evaluator
    files: Files
    evaluations: int  # that sensitivities took
