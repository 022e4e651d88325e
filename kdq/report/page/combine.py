"""What may stand in one table: workdirs of the same data whose arms are the same."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdq.report import Record
from kdq.report.advisor.evidence import MEASURED, NEEDED, Source
from kdq.report.aggregate import Row, one_seed, rows
from kdq.report.page.read import Folder, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs that may be compared. Names of arms are unique, and each seed is there once."""

    name: str
    data: Mapping[str, str]  # split -> digest; empty where it was not recorded
    folders: tuple[Folder, ...]
    runs: tuple[Run, ...]
    problems: tuple[str, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        """Of all runs."""
        return tuple(run.record for run in self.runs)

    @functools.cached_property
    def rows(self) -> list[Row]:
        """One an arm."""
        return rows(self.records)

    @property
    def one_seed(self) -> bool:
        """Returns whether no arm has more than one."""
        return one_seed(self.rows)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """Of the first workdir that has one."""
        return next((f.config for f in self.folders if f.config), None)

    @property
    def devices(self) -> list[str]:
        """That trained."""
        return list(dict.fromkeys(r["device"] for r in self.records if r.get("device")))

    def folders_of(self, arm: str) -> list[Path]:
        """Of each finished seed."""
        own = [run for run in self.runs if run.record["arm"] == arm]
        return [run.folder for run in own if run.record["status"] == "ok"]

    def source(self) -> tuple[Source, list[str]]:
        """What the advisor judges, and what it can't: records that lack what it needs."""
        usable, problems, config = [], [], self.config
        for record in self.records:
            wanted = NEEDED + (MEASURED if record["status"] == "ok" else ())
            missing = [key for key in wanted if record.get(key) is None]
            if config and record["arm"] not in config["arms"]:
                missing.append("place in config.json")
            if missing:
                problems.append(
                    f"{record['arm']}, seed {record['seed']}: the advisor leaves it out, it has no "
                    f"{', '.join(missing)}"
                )
            else:
                usable.append(record)
        source = Source(
            name=self.name, path=self.folders[0].path, records=tuple(usable), config=config
        )
        return source, problems


def experiments(folders: Sequence[Folder]) -> list[Experiment]:
    """Workdirs are merged if they have an arm in common, and all common arms are the same.

    Arms are the same if their digests are: of the data, and of the whole config that decides their
    numbers. Of a seed that is there twice the first counts.
    """
    found: list[Experiment] = []
    for folder in folders:
        for data, runs in _by_data(folder.runs).items():
            one = _unique(folder, dict(data), runs)
            for i, other in enumerate(found):
                if other.data == one.data and (why := _differ(other, one)) is None:
                    found[i] = _merged(other, one)
                    break
                if other.data == one.data:
                    one = dataclasses.replace(one, problems=(*one.problems, why))
            else:
                found.append(one)
    return _named(found)


def _by_data(runs: Sequence[Run]) -> dict[tuple[tuple[str, str], ...], list[Run]]:
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        digests = run.record.get("data") or {}
        key = tuple(sorted((str(k), str(v)) for k, v in digests.items()))
        found.setdefault(key, []).append(run)
    return found


def _unique(folder: Folder, data: Mapping[str, str], runs: Sequence[Run]) -> Experiment:
    """One workdir's runs of the same data, without seeds of an arm that are of another arm."""
    kept, problems, first = {}, list(folder.problems), {}
    for run in runs:
        arm, seed = run.record["arm"], run.record["seed"]
        own = first.setdefault(arm, run)
        if (arm, seed) in kept:
            problems.append(f"{run.folder}: left out, {kept[arm, seed].folder} is of {arm} too")
        elif difference := _other_arm(own.record, run.record):
            problems.append(
                f"{run.folder}: left out, as its {difference} is another than in {own.folder}"
            )
        else:
            kept[arm, seed] = run
    return Experiment(
        name=folder.name,
        data=data,
        folders=(folder,),
        runs=tuple(kept.values()),
        problems=tuple(problems),
    )


def _other_arm(a: Record, b: Record) -> str:
    """What two seeds of one arm must agree on and do not; ""."""
    for key in ("arm_digest", "kind", "reference", "selected_on"):
        if None not in (a.get(key), b.get(key)) and a[key] != b[key]:
            return key
    return ""


def _differ(a: Experiment, b: Experiment) -> str | None:
    """Why two experiments on the same data are kept apart; None if they need not be."""
    first, second = ({run.record["arm"]: run.record for run in one.runs} for one in (a, b))
    common = [arm for arm in first if arm in second]
    other = [arm for arm in common if first[arm].get("arm_digest") != second[arm].get("arm_digest")]
    if other:
        names = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        return f"kept apart from {a.name}: its arms {names} were run with another config"
    if not common:
        return f"kept apart from {a.name}: they have no arm in common"
    return None


def _merged(a: Experiment, b: Experiment) -> Experiment:
    there = {(run.record["arm"], run.record["seed"]): run for run in a.runs}
    problems, first = [*a.problems, *b.problems], {r["arm"]: r for r in reversed(a.records)}
    for run in b.runs:
        key = run.record["arm"], run.record["seed"]
        if key in there:
            problems.append(f"{run.folder}: left out, {there[key].folder} is the same arm and seed")
            continue
        # What an arm is compared with is a matter of the report, and no part of what it is.
        own = first.get(run.record["arm"], run.record)
        record = {**run.record, "reference": own.get("reference")}
        there[key] = dataclasses.replace(run, record=record)
    order = list(dict.fromkeys(arm for arm, _ in there))
    runs = sorted(there.values(), key=lambda run: order.index(run.record["arm"]))
    return dataclasses.replace(
        a,
        name=f"{a.name} + {b.name}",
        folders=(*a.folders, *b.folders),
        runs=tuple(runs),
        problems=tuple(dict.fromkeys(problems)),
    )


def _named(found: Sequence[Experiment]) -> list[Experiment]:
    """Names that are unique: a workdir may hold records of several data."""
    names = [one.name for one in found]
    return [
        dataclasses.replace(one, name=f"{one.name} ({names[:i].count(one.name) + 1})")
        if names.count(one.name) > 1
        else one
        for i, one in enumerate(found)
    ]
