"""Which arms satisfy constraints, in which order, and what the others lack.

Whatever is selected here is selected on validation; test accuracy is read by nothing in this file.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from kdq.evaluate.statistics import PairedInterval, paired_interval, summary
from kdq.fields import ConfigError, unknown
from kdq.report.advisor.evidence import Candidate, Study
from kdq.report.advisor.rules import INTEGERS, METHODS, REQUIREMENTS, TIE

KIB = 1024
PACKED = "packed"  # kdq's own file
ROUNDING = 1e-9  # a mean of shares of examples can miss the limit that it equals by this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """What the device and the project allow; None is no limit."""

    max_size_kib: float | None = None  # file on disk, 1024 bytes
    max_latency_ms: float | None = None  # of one batch
    batch: int = 1
    max_energy_uj: float | None = None  # modelled, of one example
    min_accuracy: float | None = None  # percent
    max_drop: float | None = None  # points below the teacher
    integers: str = "sub8"  # a key of kdq.report.advisor.rules.INTEGERS
    training_minutes: float | None = None  # on the machine of the records
    labels: bool = True  # for training; there are always some for validation
    teacher: bool = True  # a trained teacher is there

    def __post_init__(self):
        if self.integers not in INTEGERS:
            raise ConfigError(unknown("--integers:", self.integers, INTEGERS))
        if self.batch < 1:
            raise ConfigError(f"--batch={self.batch}: want at least 1")
        for name in ("max_size_kib", "max_latency_ms", "max_energy_uj"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name}={value}: want a number above 0")
        for name, most in (("min_accuracy", 100), ("max_drop", 100), ("training_minutes", 1e9)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ConfigError(f"--{name}={value}: want 0 to {most:g}")

    @property
    def limits(self) -> dict[str, float]:
        """The numbers among them, by the names of `kdq.report.advisor.rules.REQUIREMENTS`."""
        given = {
            "size": self.max_size_kib,
            "latency": self.max_latency_ms,
            "energy": self.max_energy_uj,
            "accuracy": self.min_accuracy,
            "drop": self.max_drop,
            "training": self.training_minutes,
        }
        return {name: limit for name, limit in given.items() if limit is not None}

    def __str__(self) -> str:
        said = [
            {
                "size": f"file of at most {self.max_size_kib} KiB",
                "latency": f"at most {self.max_latency_ms} ms for a batch of {self.batch}",
                "energy": f"at most {self.max_energy_uj} µJ an example (modelled)",
                "accuracy": f"accuracy of at least {self.min_accuracy}%",
                "drop": f"at most {self.max_drop} points below the teacher",
                "training": f"at most {self.training_minutes} minutes of training",
            }[name]
            for name in self.limits
        ]
        said += {"none": ["no integers"], "8": ["8-bit integers only"]}.get(self.integers, [])
        said += [] if self.labels else ["no labels to train with"]
        said += [] if self.teacher else ["no teacher"]
        return ", ".join(said) or "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One constraint and one arm."""

    requirement: str  # a key of kdq.report.advisor.rules.REQUIREMENTS
    state: str  # "yes", "likely" (the mean does, its interval or single seed does not), "no", "?"
    value: float = math.nan  # in the requirement's unit
    limit: float = math.nan
    shortfall: float = 0.0  # how far `value` is beyond the limit, as a share of it or in points


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """An arm, the file of it that would be used, and how it stands to every constraint."""

    candidate: Candidate
    file: str  # PACKED or an export format
    checks: tuple[Check, ...]

    def named(self, *states: str) -> tuple[str, ...]:
        """The requirements whose check is in one of the states."""
        return tuple(c.requirement for c in self.checks if c.state in states)

    @property
    def satisfies(self) -> bool:
        """Whether every constraint is met, at least by the means."""
        return not self.named("no", "?")

    @property
    def certain(self) -> bool:
        """Whether intervals over seeds are within the constraints, too."""
        return not self.named("no", "?", "likely")

    @property
    def size_bytes(self) -> float:
        """Of the file that would be used."""
        if self.file == PACKED:
            return self.candidate.size_bytes
        return self.candidate.files[self.file].size_bytes

    def fastest(self, batch: int) -> tuple[str, float]:
        """The format and milliseconds of a batch: of the file, or of any export beside PACKED."""
        files = self.candidate.files
        names = files if self.file == PACKED else [self.file]
        times = {n: files[n].milliseconds[batch] for n in names if batch in files[n].milliseconds}
        return min(times.items(), key=lambda item: item[1], default=("", math.nan))

    def milliseconds(self, batch: int) -> float:
        """The second of these; nan where not measured."""
        return self.fastest(batch)[1]


def fit(candidate: Candidate, constraints: Constraints, study: Study) -> Fit:
    """How an arm stands to the constraints, in the file that stands best."""
    timed = [n for n, f in candidate.files.items() if constraints.batch in f.milliseconds]
    limited = constraints.max_latency_ms is not None
    fits = [
        Fit(
            candidate=candidate,
            file=file,
            checks=tuple(_checks(candidate, file, constraints, study)),
        )
        for file in (timed if timed and limited else [PACKED])
    ]
    # Size and latency have to hold of one and the same file.
    return min(fits, key=lambda f: (len(f.named("no")), f.milliseconds(constraints.batch)))


def _checks(candidate: Candidate, file: str, constraints: Constraints, study: Study) -> list[Check]:
    own = Fit(candidate=candidate, file=file, checks=())
    values = {
        "size": own.size_bytes / KIB,
        "latency": own.milliseconds(constraints.batch),
        "energy": candidate.energy_nj / 1000,
        "training": candidate.seconds / 60,
    }
    checks = []
    for name, limit in constraints.limits.items():
        if name in values:
            checks.append(_at_most(name, values[name], limit))
        elif name == "accuracy":
            floor = dict.fromkeys(candidate.validation, limit)
            margin = paired_interval(candidate.validation, floor)
            checks.append(_at_least(name, margin, limit, limit + margin.mean))
        else:
            below = drop(candidate, study)
            if candidate is study.teacher(candidate.source):
                checks.append(Check(requirement=name, state="yes", value=0.0, limit=limit))
            elif below is None:
                checks.append(Check(requirement=name, state="?", limit=limit))
            else:
                room = dataclasses.replace(
                    below, mean=below.mean + limit, low=below.low + limit, high=below.high + limit
                )
                checks.append(_at_least(name, room, limit, -below.mean))
    allowed, widths = INTEGERS[constraints.integers], candidate.widths
    if constraints.integers != "sub8":
        state = "?" if widths is None else "yes" if widths <= allowed else "no"
        checks.append(Check(requirement="integers", state=state))
    if not constraints.labels:
        state = {None: "?", True: "no", False: "yes"}[candidate.lineage.labels]
        checks.append(Check(requirement="labels", state=state))
    if not constraints.teacher:
        state = "no" if candidate.lineage.teacher else "yes"
        checks.append(Check(requirement="teacher", state=state))
    return checks


def _at_most(name: str, value: float, limit: float) -> Check:
    state = "?" if math.isnan(value) else "yes" if value <= limit + ROUNDING else "no"
    over = (value - limit) / limit if limit else value
    return Check(requirement=name, state=state, value=value, limit=limit, shortfall=over)


def _at_least(name: str, room: PairedInterval, limit: float, value: float) -> Check:
    """From how far an accuracy is above what is wanted, with its interval over seeds."""
    state = "no" if room.mean < -ROUNDING else "yes" if room.low >= -ROUNDING else "likely"
    return Check(requirement=name, state=state, value=value, limit=limit, shortfall=-room.mean)


def drop(candidate: Candidate, study: Study) -> PairedInterval | None:
    """Validation accuracy above the experiment's teacher, points; None without common seeds."""
    teacher = study.teacher(candidate.source)
    return None if teacher is None else difference(candidate.validation, teacher.validation)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> PairedInterval | None:
    """a − b over the seeds that both have; None if there are none."""
    common = a.keys() & b.keys()
    if not common:
        return None
    return paired_interval({s: a[s] for s in common}, {s: b[s] for s in common})


def mean(values: Mapping[int, float]) -> float:
    """Over seeds."""
    return summary(values.values())[0]


def rank(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Groups of arms that can't be told apart on validation, the best first.

    A group is the best arm that is left and those that tie with it: with means within `TIE` of each
    other and a paired interval over common seeds that contains 0, or none. Within a group come
    first those that are certain to satisfy the constraints, then the simplest method, the shortest
    training, the smallest file.
    """
    left = sorted(fits, key=lambda f: (-mean(f.candidate.validation), f.candidate.validation_nll))
    groups = []
    while left:
        best = left[0]
        group = [f for f in left if f is best or _ties(best.candidate, f.candidate)]
        left = [f for f in left if f not in group]
        groups.append(sorted(group, key=_effort))
    return groups


def _ties(a: Candidate, b: Candidate) -> bool:
    found = difference(a.validation, b.validation)
    apart = mean(a.validation) - mean(b.validation) if found is None else found.mean
    return abs(apart) <= TIE + ROUNDING and not (found and found.excludes_zero)


def _effort(one: Fit) -> tuple[bool, int, float, float]:
    candidate = one.candidate
    method = list(METHODS).index(candidate.method)
    return not one.certain, method, candidate.seconds, one.size_bytes


def nearest(fits: Sequence[Fit]) -> dict[str, tuple[int, Fit | None]]:
    """For each constraint that rules arms out: how many, and what misses nothing else by least.

    None stands for no arm that misses this one only.
    """
    found: dict[str, tuple[int, Fit | None]] = {}
    for name in REQUIREMENTS:
        out = [f for f in fits if name in f.named("no")]
        alone = [f for f in out if f.named("no", "?") == (name,)]
        if out:
            found[name] = (len(out), min(alone, key=lambda f: _miss(f, name), default=None))
    return found


def _miss(one: Fit, name: str) -> tuple[float, float]:
    """How far off, and between equals the more accurate."""
    shortfall = next(c.shortfall for c in one.checks if c.requirement == name)
    return shortfall, -mean(one.candidate.validation)


def closest(fits: Sequence[Fit]) -> Fit | None:
    """The arm that misses the fewest constraints, by least; None if all satisfy or none is."""
    missing = [f for f in fits if f.named("no")]
    return min(
        missing,
        key=lambda f: (
            len(f.named("no", "?")),
            max(c.shortfall for c in f.checks),
            -mean(f.candidate.validation),
        ),
        default=None,
    )
