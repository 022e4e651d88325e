"""One row an arm: means over its seeds, and its difference to the arm it is compared with."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from kdq.evaluate.statistics import PairedInterval, paired_interval, summary
from kdq.report import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean and sample standard deviation over `n` seeds; nan where there are too few."""

    mean: float
    std: float
    n: int


# Measures that only some experiments have, beside accuracy and fidelity: record key, factor.
MEASURES = {
    "ece": 100,
    "agreement_where_teacher_wrong": 100,
    "attribution_cosine": 1,
    "attribution_rank": 1,
    "path_agreement": 100,
    "adversarial_agreement": 100,
    "accuracy_corrected": 100,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a table says about one arm.  A number that nobody measured is nan or has n = 0."""

    arm: str
    kind: str  # "teacher", "student", "KD", "PTQ", "QAT", "QAD", ...
    bits: str  # "W4A8"; several where seeds differ, as a search's may
    params: float  # mean: a search may choose other widths for other seeds
    seeds: tuple[int, ...]  # that finished
    failures: tuple[tuple[int, str], ...]  # (seed, reason)
    accuracy: Mean  # percent, on test, at the selected step
    accuracy_last: Mean  # percent, on test, at the last step
    reference: str | None  # the arm that `difference` is against
    difference: PairedInterval | None  # accuracy points over common seeds; None if there are none
    no_difference: str  # why there is none, though there is a reference; or ""
    agreement: Mean  # percent
    kl_to_teacher: Mean  # nats
    size_bytes: float  # of the file on disk
    size_ratio: float  # bytes of the size baseline / size_bytes: how many times smaller
    bops: float
    energy_modelled_nj: float  # for one example; see kdq.deploy.measure.energy
    train_seconds: float
    # Of compiling, apart; nan where a record does not tell: then `train_seconds` contains it.
    compile_seconds: float
    selected_on: str
    measures: dict[str, Mean]  # by the keys of MEASURES
    quick: bool  # a trial, whose numbers mean nothing

    @property
    def method(self) -> str:
        """The arm's name without its bits: the same for an arm of other bits. May be empty."""
        name = re.sub(rf"[\s_\-/.]*{re.escape(self.bits)}", "", self.arm, flags=re.IGNORECASE)
        return name.strip(" _-/.")


def rows(records: Sequence[Record], size_baseline: str | None = None) -> list[Row]:
    """Aggregates records over seeds: one row an arm, in order of first appearance.

    Args:
      records: one dict an arm and seed.
      size_baseline: the arm whose size `size_ratio` divides.  None is the arm of kind "teacher"; if
        there is none, or more than one, no ratio is given.

    Raises:
      ValueError: no records, two records of one arm and seed, seeds of an arm that disagree about
        what the arm is, or a size baseline that is no arm.
    """
    if not records:
        raise ValueError("report: there are no records")
    arms: dict[str, dict[int, Record]] = {}
    for record in records:
        seeds = arms.setdefault(record["arm"], {})
        if record["seed"] in seeds:
            raise ValueError(f"report: two records of arm {record['arm']!r} seed {record['seed']}")
        seeds[record["seed"]] = record
    finished = {
        arm: {seed: r for seed, r in runs.items() if r["status"] == "ok"}
        for arm, runs in arms.items()
    }
    baseline = _baseline_bytes(arms, finished, size_baseline)
    return [_row(arm, list(runs.values()), finished, baseline) for arm, runs in arms.items()]


def one_seed(table: Sequence[Row]) -> bool:
    """Returns whether no arm has more than one seed, which tables then say once."""
    counts = [len(row.seeds) for row in table]
    return max(counts, default=0) == 1


def difference(
    records: Sequence[Record], arm: str, reference: str, key: str = "accuracy", factor: float = 100
) -> PairedInterval:
    """What an arm has more than another, over the seeds that both finished, with its interval.

    Args:
      records: one dict an arm and seed.
      arm: its name.
      reference: the other's.
      key: of the number in a record.
      factor: on it: 100 makes points of accuracies.

    Raises:
      ValueError: no seed that both finished with that number.
    """
    values = {
        name: _by_seed({r["seed"]: r for r in records if r["arm"] == name}, key, factor)
        for name in (arm, reference)
    }
    a, b = values[arm], values[reference]
    common = a.keys() & b.keys()
    if not common:
        known = ", ".join(dict.fromkeys(r["arm"] for r in records))
        raise ValueError(
            f"no seed with {key!r} of both {arm!r} and {reference!r}; the arms are {known}"
        )
    return paired_interval({s: a[s] for s in common}, {s: b[s] for s in common})


def _row(
    arm: str, runs: list[Record], finished: dict[str, dict[int, Record]], baseline: float
) -> Row:
    done = list(finished[arm].values())
    reference = _agreed(runs, "reference")
    difference = None
    if reference is not None:
        a, b = _by_seed(finished[arm]), _by_seed(finished.get(reference, {}))
        common = a.keys() & b.keys()
        if common:
            difference = paired_interval({s: a[s] for s in common}, {s: b[s] for s in common})
    why = _why_none(arm, reference, finished) if reference and not difference else ""
    size = _mean(done, "size_bytes").mean
    return Row(
        arm=arm,
        kind=_agreed(runs, "kind") or "",
        bits=", ".join(dict.fromkeys(str(r["bits"]) for r in done or runs if r.get("bits"))),
        params=_mean(done, "params").mean,
        seeds=tuple(sorted(finished[arm])),
        failures=tuple(
            (r["seed"], str(r.get("error") or "no reason recorded"))
            for r in runs
            if r["status"] != "ok"
        ),
        accuracy=_mean(done, "accuracy", 100),
        accuracy_last=_mean(done, "accuracy_last", 100),
        reference=reference,
        difference=difference,
        no_difference=why,
        agreement=_mean(done, "agreement", 100),
        kl_to_teacher=_mean(done, "kl_to_teacher"),
        size_bytes=size,
        size_ratio=baseline / size if size else math.nan,
        bops=_mean(done, "bops").mean,
        energy_modelled_nj=_mean(done, "energy_modelled_nj").mean,
        train_seconds=_mean(done, "train_seconds").mean,
        compile_seconds=mean_of_all(done, "compile_seconds"),
        selected_on=_agreed(runs, "selected_on") or "",
        measures={key: _mean(done, key, factor) for key, factor in MEASURES.items()},
        quick=any(record.get("quick") for record in runs),
    )


def _why_none(arm: str, reference: str, finished: Mapping[str, Mapping[int, Record]]) -> str:
    """Returns why two arms have no difference, for a cell of a table."""
    if reference not in finished:
        return "reference not run"
    if not finished[arm]:
        return "failed"
    return "no seed in common" if finished[reference] else "reference failed"


def _baseline_bytes(
    arms: dict[str, dict[int, Record]], finished: dict[str, dict[int, Record]], name: str | None
) -> float:
    if name is None:
        teachers = [
            arm for arm, runs in arms.items() if _agreed(list(runs.values()), "kind") == "teacher"
        ]
        if len(teachers) != 1:
            return math.nan
        name = teachers[0]
    if name not in arms:
        raise ValueError(f"report: size baseline {name!r} is no arm; valid: {', '.join(arms)}")
    return _mean(list(finished[name].values()), "size_bytes").mean


def _agreed(runs: list[Record], key: str):
    """The one value that all seeds of an arm have; None where none has it."""
    values = [r[key] for r in runs if r.get(key) is not None]
    if any(value != values[0] for value in values):
        raise ValueError(
            f"report: seeds of arm {runs[0]['arm']!r} disagree about {key!r}: "
            f"{sorted(map(str, set(values)))}"
        )
    return values[0] if values else None


def number(record: Record, key: str) -> float:
    """A record's number; nan where it is absent, or null as JSON writes a nan."""
    value = record.get(key)
    return math.nan if value is None else float(value)


def _mean(runs: list[Record], key: str, scale: float = 1) -> Mean:
    """Over the seeds that have the number: an arm without a teacher has no agreement."""
    values = [number(r, key) * scale for r in runs]
    values = [v for v in values if not math.isnan(v)]
    mean, std = summary(values)
    return Mean(mean=mean, std=std, n=len(values))


def mean_of_all(runs: Sequence[Record], key: str) -> float:
    """Returns the mean over records; nan unless all of them have the number."""
    return summary([number(record, key) for record in runs])[0]


def _by_seed(
    runs: dict[int, Record], key: str = "accuracy", factor: float = 100
) -> dict[int, float]:
    values = {s: factor * number(r, key) for s, r in runs.items() if r["status"] == "ok"}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}
