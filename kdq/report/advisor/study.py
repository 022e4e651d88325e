"""Studies: arms of experiments that may be compared, with what they build on and were timed at."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdq.evaluate.statistics import PairedInterval, summary
from kdq.fields import ConfigError
from kdq.record import ArmRecord
from kdq.report.aggregate import (
    Row,
    compare_on_test,
    interval_of,
    mean_of_all,
    numbers_by_seed,
    timings,
)
from kdq.report.metric import task_key, task_of_records
from kdq.report.workdirs import Workdir
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks import Task

QUANTIZED = ("PTQ", "QAT", "QAD")
Values = Mapping[int, float]  # of a metric by seed, as it is recorded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """Trainings, labels and teachers that an arm builds on, but the teacher's own training.

    A workdir's config.json says it. Without one it is inferred from what each arm is compared with
    ("reference"), and is not `known`.
    """

    start: str | None  # the float arm whose weights it starts from; None for fresh or unknown ones
    trained: tuple[str, ...]  # arms that have to be trained for it, itself included
    known: bool  # whether a config says so, and not a guess from references
    teacher: bool  # whether a teacher takes part, or is itself what is compressed
    labels: bool | None  # whether training needs labels; None: the records do not say
    distilled: bool  # whether what it starts from was taught
    control: bool = False  # a deliberately spoiled teacher: for science, not for use


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class File:
    """An exported file, means over seeds."""

    size_bytes: float
    milliseconds: Mapping[int, float]  # by batch size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidate(Row):
    """An arm, with what the advisor has to know of it beside its measurements."""

    source: Workdir
    method: str  # a key of kdq.report.advisor.rules.METHODS
    widths: frozenset[int] | None  # bits of integers; empty for float, None where not known
    files: Mapping[str, File]  # by export format
    seconds: float  # of training, with what the arm starts from as far as `lineage` has it
    # Of compiling for that, apart from `seconds`; nan where a record does not tell, which has it
    # there.
    seconds_of_compiling: float
    lineage: Lineage

    @property
    def validation(self) -> Values:
        """The metric on validation, by seed."""
        return self.values(self.metric.name, "validation")

    @property
    def params(self) -> int:
        """Parameters, rounded where a search chose other widths for other seeds."""
        return round(self.mean("params"))

    @property
    def compiling_is_within(self) -> bool:
        """Returns whether the seconds of training contain those of compiling."""
        return self.seconds > 0 and math.isnan(self.seconds_of_compiling)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Arms that may be compared: the same data and metric and, for latencies, one device."""

    data: Mapping[str, str]  # split -> digest
    task: "Task"
    timed_on: str  # "" where nothing was timed
    sources: tuple[Workdir, ...]
    candidates: tuple[Candidate, ...]
    failures: tuple[tuple[Workdir, ArmRecord], ...]

    @property
    def metric(self) -> Metric:
        """The metric that arms are ranked by."""
        return self.task.primary

    def find(self, source: Workdir, arm: str | None) -> Candidate | None:
        """Returns an arm of an experiment; None where it has no finished seed."""
        arms = (c for c in self.candidates if c.source is source and c.arm == arm)
        return next(arms, None)

    def teacher(self, source: Workdir) -> Candidate | None:
        """Returns the teacher of an experiment."""
        arms = (c for c in self.candidates if c.source is source and c.kind == "teacher")
        return next(arms, None)

    def drop(self, arm: Candidate) -> PairedInterval | None:
        """Returns an arm's metric on validation less its teacher's; None without common seeds."""
        teacher = self.teacher(arm.source)
        if teacher is None:
            return None
        return interval_of(arm.validation, teacher.validation, self.metric)

    def drop_on_test(self, arm: Candidate) -> PairedInterval | None:
        """Returns the same on test, as `kdq.report.aggregate.compare_on_test` does."""
        teacher = self.teacher(arm.source)
        return None if teacher is None else compare_on_test(arm, teacher)[0]

    def label(self, candidate: Candidate) -> str:
        """Returns an arm's name, with its experiment where there are several."""
        several = len(self.sources) > 1
        return f"{candidate.source.name}: {candidate.arm}" if several else candidate.arm


def studies(sources: Iterable[Workdir]) -> list[Study]:
    """Groups what may be compared: by task and digests of the data, and by latencies' device."""
    groups: dict[tuple, dict[str, tuple[Workdir, list[ArmRecord]]]] = {}
    for source in sources:
        for record in source.records:
            key = task_key(record), tuple(sorted(record.data.items()))
            group = groups.setdefault(key, {})
            group.setdefault(source.name, (source, []))[1].append(record)
    result = []
    for members in map(list, map(dict.values, groups.values())):
        records = [record for _, each in members for record in each]
        devices = dict.fromkeys(device for r in records for _, (device, _), _ in timings(r))
        for device in devices or ("",):
            task, candidates, failures = task_of_records(records), [], []
            for source, each in members:
                finished: dict[str, list[ArmRecord]] = {}
                for record in each:
                    if record.status == "ok":
                        finished.setdefault(record.arm, []).append(record)
                    else:
                        failures.append((source, record))
                candidates += [_candidate(source, task, arm, finished, device) for arm in finished]
            result.append(
                Study(
                    data=records[0].data,
                    task=task,
                    timed_on=device,
                    sources=tuple(source for source, _ in members),
                    candidates=tuple(candidates),
                    failures=tuple(failures),
                )
            )
    return result


def _candidate(
    source: Workdir, task: "Task", arm: str, finished: Mapping[str, list[ArmRecord]], device: str
) -> Candidate:
    runs = finished[arm]
    if len(kinds := {run.kind for run in runs}) > 1:
        raise ConfigError(f"{source.path}: seeds of {arm!r} disagree on kind: {kinds}")
    kind = runs[0].kind
    if source.config:
        lineage = _read_lineage(source.config, arm)
    else:
        lineage = _infer_lineage({name: each[0] for name, each in finished.items()}, arm)
    trained = [finished[name] for name in lineage.trained if name in finished]
    if lineage.known and len(trained) < len(lineage.trained):
        lineage = dataclasses.replace(lineage, known=False)  # what it starts from is not there
    if any(len(set(run.policy.values())) > 1 for run in runs):
        method = "mixed precision"  # a search may find the same bits for all layers at one seed
    elif kind in ("teacher", "labels"):
        method = "labels only"
    else:
        method = "KD then PTQ" if kind == "PTQ" and lineage.distilled else kind
    mean = lambda each: summary(numbers_by_seed(each, "train_seconds").values())[0]
    return Candidate(
        arm=arm,
        task=task,
        runs=tuple(runs),
        scores={r.seed: kept for r in runs if (kept := source.scores.get((arm, r.seed)))},
        source=source,
        method=method,
        widths=_widths(runs),
        files=_files(runs, device),
        seconds=sum(map(mean, trained)),
        seconds_of_compiling=sum(mean_of_all(each, "compile_seconds") for each in trained),
        lineage=lineage,
    )


def _widths(runs: Sequence[ArmRecord]) -> frozenset[int] | None:
    """Returns the bits of all integers; None for a name that does not say."""
    widths: set[int] = set()
    for bits in (b for run in runs for b in (run.policy or {"": run.bits}).values()):
        if bits in ("fp32", ""):
            continue
        match = re.fullmatch(r"(?:W(\d+))?(?:A(\d+))?", bits)
        if match is None:
            return None
        widths |= {int(width) for width in match.groups() if width}
    return frozenset(widths)


def _files(runs: Sequence[ArmRecord], device: str) -> dict[str, File]:
    """Returns exported files, with the latencies that were taken on the device."""
    sizes: dict[str, list[float]] = {}
    times: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for form, entry in run.exports.items():
            sizes.setdefault(form, []).append(entry["size_bytes"])
        for form, (where, batch), entry in timings(run):
            if where == device:
                times.setdefault(form, {}).setdefault(batch, []).append(entry["milliseconds"])
    mean = lambda values: summary(values)[0]
    return {
        form: File(
            size_bytes=mean(values),
            milliseconds={batch: mean(each) for batch, each in times.get(form, {}).items()},
        )
        for form, values in sizes.items()
    }


def _read_lineage(config: Mapping[str, Any], arm: str) -> Lineage:
    """Returns the lineage that the config.json of a workdir says."""
    arms, main = config["arms"], config["teacher"]
    chain = [arm]
    while chain[-1] != main and arms[chain[-1]].get("init"):
        chain.append(arms[chain[-1]]["init"])
    trained = [name for name in chain if name != main and arms[name].get("epochs")]
    # "" of no teacher, "arm", or the kind of one of the config's `teachers`.
    teachers = [arms[name].get("teacher") for name in chain if name != main]
    kinds = [t and config.get("teachers", {}).get(t, {}).get("kind", "arm") for t in teachers]
    floats = [name for name in chain[1:] if not arms[name].get("bits")]
    # A loss with the task in it needs labels; a schedule may have it: it counts.
    labelled = [
        not arms[name].get("teacher")
        or config["distill"][arms[name]["distill"]].get("task", 0.1) != 0
        for name in trained
    ]
    return Lineage(
        start=floats[0] if floats else None,
        trained=tuple(trained),
        known=True,
        teacher=main in chain or any(k not in (None, "", "moving_average", "peer") for k in kinds),
        labels=any(labelled),
        distilled=any(kinds[1:]),
        control="shuffled" in kinds,
    )


def _infer_lineage(arms: Mapping[str, ArmRecord], arm: str) -> Lineage:
    """Infers the lineage from the records of an experiment alone: `arms` has one of each arm."""
    kind, start = arms[arm].kind, None
    if kind in QUANTIZED:
        # The first float arm of the same parameters on the way along the references.
        seen, name = {arm}, arms[arm].reference
        while name in arms and name not in seen and arms[name].kind in QUANTIZED:
            seen.add(name)
            name = arms[name].reference
        if name in arms and name not in seen and arms[name].params == arms[arm].params:
            start = name
    steps = [arms[name] for name in (arm, start) if name]
    kinds = [record.kind for record in steps]
    # A recipe may mix the labels in or not, and where QAD starts no reference tells.
    unclear = "KD" in kinds or "QAD" in kinds or kinds == ["PTQ"]
    return Lineage(
        start=start,
        trained=tuple(r.arm for r in steps if r.kind != "teacher" and r.steps != 0),
        known=kind == "teacher",
        teacher="teacher" in kinds or "KD" in kinds or kind == "QAD",
        labels=None if unclear else "labels" in kinds or "QAT" in kinds,
        distilled=kinds[1:] == ["KD"],
    )
