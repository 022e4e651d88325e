"""Fits of arms to constraints, their order, and what those that do not fit lack.

Whatever is selected here is selected on validation; the metric on test is read by nothing in this
file.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from kdq.evaluate.statistics import PairedInterval, paired_interval
from kdq.fields import ConfigError, unknown
from kdq.report.advisor.rules import INTEGERS, METHODS, REQUIREMENTS
from kdq.report.advisor.study import Candidate, Study
from kdq.report.aggregate import Mean, interval_of
from kdq.tasks.metric import Metric

KIB = 1024
PACKED = "packed"  # kdq's own file
ROUNDING = 1e-9  # a mean of shares of examples can miss the limit that it equals by this
LIMITS = {  # requirement -> its field of `Constraints`
    "size": "max_size_kib",
    "latency": "max_latency_ms",
    "energy": "max_energy_uj",
    "accuracy": "min_accuracy",
    "drop": "max_drop",
    "training": "training_minutes",
}
POSITIVE = ("max_size_kib", "max_latency_ms", "max_energy_uj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """Limits of the device and the project; None is no limit."""

    max_size_kib: float | None = None  # file on disk, 1024 bytes
    max_latency_ms: float | None = None  # of one batch
    batch: int = 1
    max_energy_uj: float | None = None  # modelled, of one example
    # Of the metric that arms are ranked by, as it is shown: the least, or the most where lower
    # values are better; and how far an arm may be behind the teacher.
    min_accuracy: float | None = None
    max_drop: float | None = None
    integers: str = "sub8"  # a key of kdq.report.advisor.rules.INTEGERS
    training_minutes: float | None = None  # on the machine of the records
    labels: bool = True  # for training; there are always some for validation
    teacher: bool = True  # a trained teacher is there

    def __post_init__(self):
        if self.integers not in INTEGERS:
            raise ConfigError(unknown("--integers:", self.integers, INTEGERS))
        if self.batch < 1:
            raise ConfigError(f"--batch={self.batch}: expected at least 1")
        for name in LIMITS.values():
            value, positive = getattr(self, name), name in POSITIVE
            if value is None or (0 < value < math.inf if positive else 0 <= value <= 1e9):
                continue
            raise ConfigError(
                f"--{name}={value}: expected {'a number above 0' if positive else '0 to 1e+09'}"
            )

    def check(self, metric: Metric) -> None:
        """Raises ConfigError for limits of a metric in percent that are above 100."""
        for name in ("min_accuracy", "max_drop") if metric.unit == "%" else ():
            if (getattr(self, name) or 0) > 100:
                raise ConfigError(f"--{name}={getattr(self, name)}: expected 0 to 100")

    @property
    def limits(self) -> dict[str, float]:
        """The numbers among them, by the names of `kdq.report.advisor.rules.REQUIREMENTS`."""
        limits = {requirement: getattr(self, name) for requirement, name in LIMITS.items()}
        return {requirement: limit for requirement, limit in limits.items() if limit is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A check of one arm by one constraint."""

    requirement: str  # a key of kdq.report.advisor.rules.REQUIREMENTS
    state: str  # "yes", "likely" (the mean does, its interval or single seed does not), "no", "?"
    value: float = math.nan  # in the requirement's unit
    limit: float = math.nan
    shortfall: float = 0.0  # of `value` beyond the limit, as a share of it or as a difference

    def relax(self, metric: Metric) -> str:
        """Returns what would let an arm in that the check rules out."""
        requirement = REQUIREMENTS[self.requirement]
        if math.isnan(self.value):
            return f"{self.requirement} ({requirement.fails})"
        units = {"accuracy": metric.unit, "drop": metric.difference_unit}
        unit = units.get(self.requirement, requirement.unit)
        # Rounded to four digits, to the side on which the arm fits.
        least = self.requirement == "accuracy" and metric.higher_is_better
        digit = 10.0 ** (math.floor(math.log10(self.value)) - 3) if self.value > 0 else 1.0
        value = (math.floor if least else math.ceil)(round(self.value / digit, 6)) * digit
        return f"{self.requirement} from {self.limit:g} to {value:.4g} {unit}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """An arm, the file of it that would be used, and how it stands to every constraint."""

    candidate: Candidate
    file: str  # PACKED or an export format
    checks: tuple[Check, ...]

    def named(self, *states: str) -> tuple[str, ...]:
        """The requirements whose check is in one of the states."""
        return tuple(c.requirement for c in self.checks if c.state in states)

    def check(self, requirement: str) -> Check:
        """The check of a requirement that there is one of."""
        return next(c for c in self.checks if c.requirement == requirement)

    @property
    def satisfies(self) -> bool:
        """Returns whether every constraint is met, at least by the means."""
        return not self.named("no", "?")

    @property
    def certain(self) -> bool:
        """Returns whether intervals over seeds are within the constraints, too."""
        return not self.named("no", "?", "likely")

    @property
    def size_bytes(self) -> float:
        """Bytes of the file that would be used."""
        if self.file == PACKED:
            return self.candidate.size_bytes
        return self.candidate.files[self.file].size_bytes

    def fastest(self, batch: int) -> tuple[str, float]:
        """The format and milliseconds of a batch: of the file, or of any export beside PACKED."""
        files = self.candidate.files
        names = files if self.file == PACKED else [self.file]
        times = {n: files[n].milliseconds[batch] for n in names if batch in files[n].milliseconds}
        return min(times.items(), key=lambda item: item[1], default=("", math.nan))


def fit(candidate: Candidate, constraints: Constraints, study: Study) -> Fit:
    """Returns how an arm stands to the constraints, in the file that stands best."""
    batch = constraints.batch
    timed = [n for n, f in candidate.files.items() if batch in f.milliseconds]
    fits = []
    for file in timed if timed and constraints.max_latency_ms is not None else [PACKED]:
        unchecked = Fit(candidate=candidate, file=file, checks=())
        fits.append(
            dataclasses.replace(unchecked, checks=tuple(_check(unchecked, constraints, study)))
        )
    # Size and latency have to hold of one and the same file.
    return min(fits, key=lambda f: (len(f.named("no")), f.fastest(batch)[1]))


def _check(unchecked: Fit, constraints: Constraints, study: Study) -> Iterator[Check]:
    """Yields the checks of the limits, then of what the device and the project do not have."""
    candidate, metric = unchecked.candidate, study.metric
    values = {
        "size": unchecked.size_bytes / KIB,
        "latency": unchecked.fastest(constraints.batch)[1],
        "energy": candidate.energy_modelled_nj / 1000,
        "training": candidate.seconds / 60,
    }
    for name, limit in constraints.limits.items():
        if name in values:
            value = values[name]
            state = "?" if math.isnan(value) else "yes" if value <= limit + ROUNDING else "no"
            over = (value - limit) / limit if limit else value
            yield Check(requirement=name, state=state, value=value, limit=limit, shortfall=over)
            continue
        if name == "accuracy":
            sign = 1 if metric.higher_is_better else -1
            shown = {seed: metric.shown(v) for seed, v in candidate.validation.items()}
            gains = {seed: sign * (value - limit) for seed, value in shown.items()}
            room = paired_interval(gains, dict.fromkeys(gains, 0.0))
            value = limit + sign * room.mean
        elif candidate is study.teacher(candidate.source):
            yield Check(requirement=name, state="yes", value=0.0, limit=limit)
            continue
        elif (gain := gain_of(study.drop(candidate), metric)) is None:
            yield Check(requirement=name, state="?", limit=limit)
            continue
        else:
            value = -gain.mean
            room = dataclasses.replace(gain, mean=gain.mean + limit, low=gain.low + limit)
        # By how much the metric is better than the limit, with its interval.
        state = "no" if room.mean < -ROUNDING else "yes" if room.low >= -ROUNDING else "likely"
        yield Check(requirement=name, state=state, value=value, limit=limit, shortfall=-room.mean)
    if constraints.integers != "sub8":
        allowed, widths = INTEGERS[constraints.integers], candidate.widths
        state = "?" if widths is None else "yes" if widths <= allowed else "no"
        yield Check(requirement="integers", state=state)
    if not constraints.labels:
        state = {None: "?", True: "no", False: "yes"}[candidate.lineage.labels]
        yield Check(requirement="labels", state=state)
    if not constraints.teacher:
        yield Check(requirement="teacher", state="no" if candidate.lineage.teacher else "yes")


def gain_of(difference: PairedInterval | None, metric: Metric) -> PairedInterval | None:
    """Returns a difference that is above 0 where the first one is better."""
    if difference is None or metric.higher_is_better:
        return difference
    low, high = -difference.high, -difference.low
    return dataclasses.replace(difference, mean=-difference.mean, low=low, high=high)


def merit(candidate: Candidate) -> float:
    """Returns the metric on validation, higher for the better arm."""
    value = candidate.mean_of(candidate.metric, "validation").mean
    return value if candidate.metric.higher_is_better else -value


def by_validation(candidate: Candidate) -> tuple[float, float]:
    """Sorts the best first; between equals by the next of the task's metrics."""
    second = candidate.task.metrics[1]
    value = candidate.mean(second.name, "validation")
    return -merit(candidate), -value if second.higher_is_better else value


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """Returns the best on validation."""
    return min(candidates, key=by_validation, default=None)


def rank(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Groups arms that can't be told apart on validation, the best first.

    A group is the best arm that is left and those that tie with it: with means within the metric's
    `tie` of each other and a paired interval over common seeds that contains 0, or none. Within a
    group come first those that are certain to satisfy the constraints, then the simplest method,
    the shortest training, the smallest file.
    """
    left = sorted(fits, key=lambda f: by_validation(f.candidate))
    simplest, groups = list(METHODS), []
    while left:
        leader = left[0]
        group = [f for f in left if f is leader or _ties(leader.candidate, f.candidate)]
        left = [f for f in left if f not in group]
        effort = lambda f: (
            *(not f.certain, simplest.index(f.candidate.method)),
            *(f.candidate.seconds, f.size_bytes),
        )
        groups.append(sorted(group, key=effort))
    return groups


def _ties(a: Candidate, b: Candidate) -> bool:
    metric = a.metric
    interval = interval_of(a.validation, b.validation, metric)
    if interval is not None:
        return abs(interval.mean) <= metric.tie + ROUNDING and not interval.excludes_zero
    means = [Mean.over(each.validation.values()).mean for each in (a, b)]
    return abs(metric.difference(*means)) <= metric.tie + ROUNDING


def nearest(fits: Sequence[Fit]) -> dict[str, tuple[int, Fit | None]]:
    """Returns for each constraint how many arms it rules out, and what misses it alone by least.

    Between equals the better on validation. None stands for no arm that misses this one only.
    """
    result: dict[str, tuple[int, Fit | None]] = {}
    for name in REQUIREMENTS:
        out = [f for f in fits if name in f.named("no")]
        alone = [f for f in out if f.named("no", "?") == (name,)]
        miss = lambda f, name=name: (f.check(name).shortfall, -merit(f.candidate))
        if out:
            result[name] = (len(out), min(alone, key=miss, default=None))
    return result


def closest(fits: Sequence[Fit]) -> Fit | None:
    """Returns the arm that misses the fewest constraints, by least; None if all satisfy."""
    count = lambda f: len(f.named("no", "?"))
    miss = lambda f: (count(f), max(c.shortfall for c in f.checks), -merit(f.candidate))
    return min((f for f in fits if f.named("no")), key=miss, default=None)
