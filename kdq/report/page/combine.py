"""Decides which workdirs are comparable: those of the same task and data, and the same arms."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdq.report.aggregate import Row, distinct, has_one_seed, rows
from kdq.report.cells import name_a_few
from kdq.report.metric import task_key, task_of_records
from kdq.report.workdirs import Run, Workdir, lacking
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks import Task


# Fields of which two seeds of an arm have the same, where both have one.
MUST_AGREE = ("arm_digest", "kind", "reference", "selected_on")


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
        groups: dict[tuple, list[Run]] = {}
        for run in folder.runs:
            key = task_key(run.record), tuple(sorted(run.record.data.items()))
            groups.setdefault(key, []).append(run)
        for (_, data), runs in groups.items():
            new = _without_repetitions(folder, dict(data), runs)
            for i, other in enumerate(experiments):
                if (other.data, other.task) != (new.data, new.task):
                    continue
                digests, mine = ({r.arm: r.arm_digest for r in e.records} for e in (other, new))
                changed = [a for a, digest in digests.items() if mine.get(a, digest) != digest]
                if digests.keys() & mine.keys() and not changed:
                    experiments[i] = _merge(other, new)
                    break
                why = "they have no arm in common"
                if changed:
                    why = f"its arms {name_a_few(changed)} were run with another config"
                why = f"kept apart from {other.name}: {why}"
                new = dataclasses.replace(new, problems=(*new.problems, why))
            else:
                experiments.append(new)
    # Numbers stand after equal names: a workdir may hold records of several data.
    names = [experiment.name for experiment in experiments]
    for i, (name, experiment) in enumerate(zip(names, experiments, strict=True)):
        if names.count(name) > 1:
            numbered = f"{name} ({names[:i].count(name) + 1})"
            experiments[i] = dataclasses.replace(experiment, name=numbered)
    return experiments


def _without_repetitions(
    folder: Workdir, data: Mapping[str, str], runs: Sequence[Run]
) -> Experiment:
    """Returns one workdir's runs of the same data, without seeds of another arm of that name."""
    kept, problems, first = {}, list(folder.problems), {}
    for run in runs:
        key = run.record.arm, run.record.seed
        before = first.setdefault(run.record.arm, run)
        both = before.record, run.record
        differ = [f for f in MUST_AGREE if len({getattr(r, f) for r in both} - {""}) > 1]
        if key in kept:
            problems.append(f"{run.folder}: left out, {kept[key].folder} is of {key[0]} too")
        elif differ:
            problems.append(
                f"{run.folder}: left out, as its {differ[0]} is another than in {before.folder}"
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
