"""One row an arm: means over its seeds, and its difference to the arm it is compared with."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdq import files
from kdq.evaluate.statistics import PairedInterval, holm, paired_interval, summary
from kdq.record import ArmRecord
from kdq.report import metric as metrics
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.evaluate.run import Scores
    from kdq.tasks import Task

Records = Sequence[ArmRecord | Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean and sample standard deviation over `n` seeds; nan where there are too few."""

    mean: float
    std: float
    n: int

    @classmethod
    def over(cls, values: Iterable[float]) -> "Mean":
        """Returns the mean over those values that are numbers."""
        numbers = [value for value in values if not math.isnan(value)]
        mean, std = summary(numbers)
        return cls(mean=mean, std=std, n=len(numbers))


def _mean_of(name: str, docstring: str) -> property:
    return property(lambda row: row.mean(name), doc=docstring)


def _text_of(field: str, docstring: str) -> property:
    return property(lambda row: _agreed(row.runs, field), doc=docstring)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """An arm and its runs. A number that nobody measured is nan, or has n = 0."""

    arm: str
    task: "Task"
    runs: tuple[ArmRecord, ...]  # a seed each, failed ones too
    # Seed -> scores of single test examples, of the seeds that kept them.
    scores: Mapping[int, "Scores"] = dataclasses.field(default_factory=dict)
    reference: str = ""  # the arm that `difference` is against
    difference: PairedInterval | None = None  # see `compare_on_test`
    difference_over_seeds: PairedInterval | None = None
    p_holm: float = math.nan  # p-value of `difference`, corrected for the table's comparisons
    no_difference: str = ""  # why there is none, though there is a reference; or ""
    size_ratio: float = math.nan  # bytes of the size baseline / size_bytes: how many times smaller

    kind = _text_of("kind", '"teacher", "student", "KD", "PTQ", "QAT", "QAD", ...')
    selected_on = _text_of("selected_on", "The split that chose the step.")
    size_bytes = _mean_of("size_bytes", "Bytes of kdq's packed file.")
    energy_modelled_nj = _mean_of(
        "energy_modelled_nj", "Of one example; see kdq.deploy.measure.energy."
    )
    train_seconds = _mean_of(
        "train_seconds", "They contain compiling where `compile_seconds` is nan."
    )

    @property
    def compile_seconds(self) -> float:
        """Seconds of compiling, apart; nan unless all records tell it."""
        return mean_of_all(self.finished, "compile_seconds")

    @property
    def metric(self) -> Metric:
        """The metric that arms are ranked by."""
        return self.task.primary

    @property
    def finished(self) -> list[ArmRecord]:
        """The runs that did not fail."""
        return [run for run in self.runs if run.status == "ok"]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that finished."""
        return tuple(sorted(run.seed for run in self.finished))

    @property
    def failures(self) -> list[tuple[int, str]]:
        """`(seed, reason)` of the runs that failed."""
        failed = [run for run in self.runs if run.status != "ok"]
        return [(run.seed, run.error or "no reason recorded") for run in failed]

    @property
    def bits(self) -> str:
        """ "W4A8"; several where seeds differ, as a search's may."""
        return ", ".join(distinct(self.finished or self.runs, "bits"))

    @property
    def quick(self) -> bool:
        """Returns whether it is a trial, whose numbers mean nothing."""
        return any(run.quick for run in self.runs)

    @property
    def family(self) -> str:
        """The arm's name without its bits: the same for an arm of other bits. May be empty."""
        name = re.sub(rf"[\s_\-/.]*{re.escape(self.bits)}", "", self.arm, flags=re.IGNORECASE)
        return name.strip(" _-/.")

    def values(self, name: str, split: str = "test") -> dict[int, float]:
        """Returns a number of each finished seed that has it."""
        return numbers_by_seed(self.finished, name, split)

    def mean(self, name: str, split: str = "test") -> float:
        """Returns the mean of a number over the seeds that have it."""
        return Mean.over(self.values(name, split).values()).mean

    def mean_of(self, metric: Metric, split: str = "test") -> Mean:
        """Returns the mean of a metric on a split, as it is shown."""
        return Mean.over(map(metric.shown, self.values(metric.name, split).values()))

    @property
    def score(self) -> Mean:
        """The metric on test, at the selected step, as it is shown."""
        return self.mean_of(self.metric)


def as_records(records: Records) -> list[ArmRecord]:
    """Returns records, of which some may be the JSON objects that hold them.

    Raises ConfigError for an object that is no record.
    """
    return [
        record if isinstance(record, ArmRecord) else ArmRecord.from_json(files.plain(record))
        for record in records
    ]


def rows(
    records: Records,
    size_baseline: str | None = None,
    scores: Mapping[tuple[str, int], "Scores"] | None = None,
) -> list[Row]:
    """Aggregates records over seeds: one row an arm, in order of first appearance.

    Args:
      records: one an arm and seed.
      size_baseline: the arm whose size `size_ratio` divides.  None is the arm of kind "teacher"; if
        there is none, or more than one, no ratio is given.
      scores: of single test examples, by arm and seed (`kdq.report.workdirs.Workdir.scores`): with
        them intervals of differences are over test examples too.

    Raises:
      ValueError: no records, records of several tasks, two records of one arm and seed, seeds of an
        arm that disagree about what the arm is, or a size baseline that is no arm.
    """
    if not records:
        raise ValueError("report: there are no records")
    records = as_records(records)
    arms: dict[str, dict[int, ArmRecord]] = {}
    for record in records:
        seeds = arms.setdefault(record.arm, {})
        if record.seed in seeds:
            raise ValueError(f"report: two records of arm {record.arm!r} seed {record.seed}")
        seeds[record.seed] = record
    task = metrics.task_of_records(records)
    table = {
        arm: Row(
            arm=arm,
            task=task,
            runs=tuple(runs.values()),
            scores={seed: kept for seed in runs if (kept := (scores or {}).get((arm, seed)))},
            reference=_agreed(runs.values(), "reference"),
        )
        for arm, runs in arms.items()
    }
    if size_baseline is None:
        teachers = [arm for arm, row in table.items() if row.kind == "teacher"]
        baseline = table[teachers[0]].size_bytes if len(teachers) == 1 else math.nan
    elif size_baseline in table:
        baseline = table[size_baseline].size_bytes
    else:
        valid = ", ".join(table)
        raise ValueError(f"report: size baseline {size_baseline!r} is no arm; valid: {valid}")
    compared = [_compared(row, table, baseline) for row in table.values()]
    corrected = holm({row.arm: row.difference.p_value for row in compared if row.difference})
    return [dataclasses.replace(r, p_holm=corrected.get(r.arm, math.nan)) for r in compared]


def _compared(row: Row, table: Mapping[str, Row], baseline: float) -> Row:
    """Returns a row with its difference to its reference and its size ratio."""
    _ = row.selected_on  # seeds that disagree are refused
    other, why = table.get(row.reference), ""
    delta, over_seeds = (None, None) if other is None else compare_on_test(row, other)
    if row.reference and delta is None:
        if other is None:
            why = "reference not run"
        elif not row.seeds:
            why = "failed"
        else:
            why = "no seed in common" if other.seeds else "reference failed"
    return dataclasses.replace(
        row,
        difference=delta,
        difference_over_seeds=over_seeds,
        no_difference=why,
        size_ratio=baseline / row.size_bytes if row.size_bytes else math.nan,
    )


def has_one_seed(table: Sequence[Row]) -> bool:
    """Returns whether no arm has more than one seed, which tables then say once."""
    return max((len(row.seeds) for row in table), default=0) == 1


def difference(
    records: Records, arm: str, reference: str, metric: Metric | str | None = None
) -> PairedInterval:
    """Returns what an arm has more than another, over the seeds that both finished.

    Args:
      records: one an arm and seed.
      arm: its name.
      reference: the other's.
      metric: gives the unit of the difference; a name is that of any number of the records, None
        the metric that their task ranks arms by.

    Raises:
      ValueError: no seed that both finished with that number.
    """
    if isinstance(metric, str):
        metric = Metric(name=metric, scores=())
    records = as_records(records)
    metric = metric or metrics.metric_of_records(records)
    of_arm, of_reference = (
        numbers_by_seed((r for r in records if r.arm == name and r.status == "ok"), metric.name)
        for name in (arm, reference)
    )
    interval = interval_of(of_arm, of_reference, metric)
    if interval is None:
        raise ValueError(
            f"no seed with {metric.name!r} of both {arm!r} and {reference!r}; the arms are "
            f"{', '.join(dict.fromkeys(r.arm for r in records))}"
        )
    return interval


def interval_of(
    a: Mapping[int, float], b: Mapping[int, float], metric: Metric
) -> PairedInterval | None:
    """Returns a − b as the metric shows differences, paired by seed; None without common seeds."""
    common = {seed: metric.difference(a[seed], b[seed]) for seed in a if seed in b}
    return paired_interval(common, dict.fromkeys(common, 0.0)) if common else None


@functools.lru_cache(maxsize=256)
def compare_on_test(a: Row, b: Row) -> tuple[PairedInterval | None, PairedInterval | None]:
    """Returns a − b on test: the interval that claims go by, and the one over seeds alone.

    The first is over seeds and test examples, and never the narrower one, where all common seeds
    kept the scores of the same predictions; else it is the second. None without common seeds.
    """
    values = [row.values(row.metric.name) for row in (a, b)]
    over_seeds = interval_of(*values, a.metric)
    common = [seed for seed in values[0] if seed in values[1]]
    if not common or any(seed not in row.scores for row in (a, b) for seed in common):
        return over_seeds, over_seeds
    from kdq.evaluate import run  # noqa: PLC0415 (JAX, which reports without scores do without)

    kept = [{seed: row.scores[seed] for seed in common} for row in (a, b)]
    try:
        return run.compare(a.metric, *kept)[1], over_seeds
    except ValueError:  # of other predictions, or of too few; the notes say which arms those are
        return over_seeds, over_seeds


def number(record: ArmRecord, name: str, split: str = "test") -> float:
    """Returns a record's number; nan where it was not measured or has no value."""
    value = record.value(name, split)
    return math.nan if value is None else float(value)


def numbers_by_seed(
    records: Iterable[ArmRecord], name: str, split: str = "test"
) -> dict[int, float]:
    """Returns a number of each seed that has it."""
    values = {record.seed: number(record, name, split) for record in records}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def mean_of_all(records: Sequence[ArmRecord], field: str) -> float:
    """Returns the mean over records; nan unless all of them have the number."""
    return summary([number(record, field) for record in records])[0]


def distinct(records: Iterable[ArmRecord], field: str) -> list[str]:
    """Returns the texts that records have in a field, once each."""
    return list(dict.fromkeys(text for r in records if (text := getattr(r, field))))


def distinct_text(records: Iterable[ArmRecord], field: str) -> str:
    """Returns the same as the words of a sentence."""
    return " and ".join(distinct(records, field)) or "not recorded"


Condition = tuple[str, int]  # device, batch size
Latencies = dict[Condition, dict[str, tuple[Mean, str]]]


def timings(record: ArmRecord) -> Iterator[tuple[str, Condition, Mapping[str, Any]]]:
    """Yields `(format, (device, batch size), times)` of the exported files of a record."""
    for form, entry in record.exports.items():
        latency = entry.get("latency") or {}
        device = (latency.get("conditions") or {}).get("device", "a device that is not recorded")
        for batch, times in latency.items():
            if batch.isdigit():
                yield form, (device, int(batch)), times


def latencies(records: Iterable[ArmRecord]) -> Latencies:
    """Returns {(device, batch): {arm: (milliseconds over seeds, the fastest format)}}."""
    times: dict[Condition, dict[str, dict[str, list[float]]]] = {}
    for record in records:
        for form, condition, entry in timings(record):
            formats = times.setdefault(condition, {}).setdefault(record.arm, {})
            formats.setdefault(form, []).append(float(entry["milliseconds"]))
    fastest = lambda means: min(means, key=lambda pair: pair[0].mean)
    return {
        condition: {
            arm: fastest([(Mean.over(values), form) for form, values in formats.items()])
            for arm, formats in arms.items()
        }
        for condition, arms in sorted(times.items())
    }


def _agreed(runs: Iterable[ArmRecord], field: str) -> str:
    """Returns the one text that all seeds of an arm have; "" where none has it."""
    runs = list(runs)
    values = distinct(runs, field)
    if len(values) > 1:
        raise ValueError(
            f"report: seeds of arm {runs[0].arm!r} disagree about {field!r}: {sorted(values)}"
        )
    return values[0] if values else ""
