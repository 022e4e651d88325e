"""Decides which workdirs are comparable: those of the same task and data, and the same arms."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdq.record import ArmRecord
from kdq.report.advisor.words import name_a_few
from kdq.report.aggregate import Row, distinct, has_one_seed, rows
from kdq.report.metric import task_key, task_of_records
from kdq.report.workdirs import Run, Workdir, lacking
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Experiment(Workdir):
    """Runs that may be compared. Names of arms are unique, and each seed is there once.

    Its path is that of the first folder, and its config that of the first that has one.
    """

    data: Mapping[str, str]  # split -> digest; empty where it was not recorded
    folders: tuple[Workdir, ...]

    @functools.cached_property
    def rows(self) -> list[Row]:
        """One an arm."""
        return rows(self.records, scores=self.scores)

    @property
    def task(self) -> "Task":
        """The task of all its records."""
        return task_of_records(self.records)

    @property
    def metric(self) -> Metric:
        """The metric that arms are ranked by."""
        return self.task.primary

    @property
    def one_seed(self) -> bool:
        """Returns whether no arm has more than one."""
        return has_one_seed(self.rows)

    @property
    def devices(self) -> list[str]:
        """Devices that trained."""
        return distinct(self.records, "device")

    def folders_of(self, arm: str) -> list[Path]:
        """Returns the folder of each finished seed."""
        runs = [run for run in self.runs if run.record.arm == arm]
        return [run.folder for run in runs if run.record.status == "ok"]

    def evidence(self) -> tuple["Experiment", list[str]]:
        """Returns what the advisor judges, and why it leaves out the other records."""
        usable, problems = [], []
        for run in self.runs:
            record, missing = run.record, lacking(run.record)
            if self.config and record.arm not in self.config["arms"]:
                missing.append("place in config.json")
            if missing:
                problems.append(
                    f"{record.arm}, seed {record.seed}: the advisor leaves it out, it has no "
                    f"{', '.join(missing)}"
                )
            else:
                usable.append(run)
        return dataclasses.replace(self, runs=tuple(usable)), problems


def combine(folders: Sequence[Workdir]) -> list[Experiment]:
    """Merges workdirs that have an arm in common, if all common arms are the same.

    Arms are the same if their digests are: of the data, and of the whole config that decides their
    numbers. Of a seed that is there twice the first counts.
    """
    experiments: list[Experiment] = []
    for folder in folders:
        for (_, data), runs in _group_comparable(folder.runs).items():
            new = _without_repetitions(folder, dict(data), runs)
            for i, other in enumerate(experiments):
                if (other.data, other.task) != (new.data, new.task):
                    continue
                if (why := _explain_difference(other, new)) is None:
                    experiments[i] = _merge(other, new)
                    break
                new = dataclasses.replace(new, problems=(*new.problems, why))
            else:
                experiments.append(new)
    return _with_unique_names(experiments)


def _group_comparable(runs: Sequence[Run]) -> dict[tuple, list[Run]]:
    """Groups runs by their task and the digests of their data."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        key = task_key(run.record), tuple(sorted(run.record.data.items()))
        groups.setdefault(key, []).append(run)
    return groups


def _without_repetitions(
    folder: Workdir, data: Mapping[str, str], runs: Sequence[Run]
) -> Experiment:
    """Returns one workdir's runs of the same data, without seeds of another arm of that name."""
    kept, problems, first = {}, list(folder.problems), {}
    for run in runs:
        key = run.record.arm, run.record.seed
        before = first.setdefault(run.record.arm, run)
        if key in kept:
            problems.append(f"{run.folder}: left out, {kept[key].folder} is of {key[0]} too")
        elif field := _disagreement(before.record, run.record):
            problems.append(
                f"{run.folder}: left out, as its {field} is another than in {before.folder}"
            )
        else:
            kept[key] = run
    return Experiment(
        name=folder.name,
        path=folder.path,
        config=folder.config,
        data=data,
        folders=(folder,),
        runs=tuple(kept.values()),
        problems=tuple(problems),
    )


def _disagreement(a: ArmRecord, b: ArmRecord) -> str:
    """Returns the field that two seeds of one arm must agree on and do not; ""."""
    for field in ("arm_digest", "kind", "reference", "selected_on"):
        values = {getattr(record, field) for record in (a, b)} - {""}
        if len(values) > 1:
            return field
    return ""


def _explain_difference(a: Experiment, b: Experiment) -> str | None:
    """Returns why two experiments on the same data are kept apart; None if they need not be."""
    digests = [{r.arm: r.arm_digest for r in experiment.records} for experiment in (a, b)]
    common = digests[0].keys() & digests[1].keys()
    others = [arm for arm in digests[0] if arm in common and digests[0][arm] != digests[1][arm]]
    if others:
        names = name_a_few(others)
        return f"kept apart from {a.name}: its arms {names} were run with another config"
    return None if common else f"kept apart from {a.name}: they have no arm in common"


def _merge(a: Experiment, b: Experiment) -> Experiment:
    runs = {(run.record.arm, run.record.seed): run for run in a.runs}
    problems, references = [*a.problems, *b.problems], {r.arm: r.reference for r in a.records}
    for run in b.runs:
        record, key = run.record, (run.record.arm, run.record.seed)
        if key in runs:
            problems.append(f"{run.folder}: left out, {runs[key].folder} is the same arm and seed")
            continue
        # What an arm is compared with is a matter of the report, and no part of what it is.
        reference = references.get(record.arm, record.reference)
        runs[key] = dataclasses.replace(
            run, record=dataclasses.replace(record, reference=reference)
        )
    order = list(dict.fromkeys(arm for arm, _ in runs))
    return dataclasses.replace(
        a,
        name=f"{a.name} + {b.name}",
        config=a.config or b.config,
        folders=(*a.folders, *b.folders),
        runs=tuple(sorted(runs.values(), key=lambda run: order.index(run.record.arm))),
        problems=tuple(dict.fromkeys(problems)),
    )


def _with_unique_names(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Numbers those of one name: a workdir may hold records of several data."""
    names = [experiment.name for experiment in experiments]
    return [
        dataclasses.replace(experiment, name=f"{name} ({names[:i].count(name) + 1})")
        if names.count(name) > 1
        else experiment
        for i, (name, experiment) in enumerate(zip(names, experiments, strict=True))
    ]
