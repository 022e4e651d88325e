"""Notes below a table: definitions, selection, and where the numbers come from."""

import math
from collections.abc import Iterable, Sequence

from kdq.evaluate.statistics import SEEDS, PairedInterval
from kdq.record import ArmRecord
from kdq.report import metric as metrics
from kdq.report.aggregate import Row, distinct_text, has_one_seed
from kdq.report.workdirs import SCORES


def notes(table: Sequence[Row], records: Sequence[ArmRecord]) -> list[str]:
    """Returns one paragraph a note, as plain text."""
    task, metric = table[0].task, table[0].metric
    first = metrics.named(metric, first=True)
    unit = metrics.in_unit(metric).replace(", ", ", in ")
    best, second = (
        f"the {'highest' if each.higher_is_better else 'lowest'} "
        f"{'negative log-likelihood' if each.name == 'nll' else metrics.named(each)}"
        for each in task.metrics[:2]
    )
    shown = (*metrics.other_metrics(task), *metrics.fidelity_metrics(task))
    defined = [text for each in (metric, *shown) if (text := metrics.definition(task, each))]
    missing = [
        f"{row.arm} (against {row.reference}: {row.no_difference})"
        for row in table
        if row.no_difference
    ]
    uniform = against_uniform(records)
    return [
        *filter(None, [seeds_note(table)]),
        f"{first}: on the test split{unit}, mean ± sample standard deviation over seeds, at "
        "the selected step; test data selects nothing.",
        f"Selected on: what chose the step, by {best} there and, between equals, {second}. An arm "
        "that is only calibrated has nothing to choose.",
        f"Δ: {metrics.units_phrase(metric)} above the arm named beside it, paired by seed over the "
        f"seeds that both finished. {intervals_note(table)}",
        *([f"Against uniform bits: {uniform}"] if uniform else []),
        *([f"No difference for: {', '.join(missing)}."] if missing else []),
        "Size: bytes of the model's file on disk, mean over seeds; 1 KiB is 1024 bytes. Smaller: "
        "the size of the baseline (the teacher, unless another was named) over this one.",
        f"{' '.join([*defined, ''])}BOPs: multiply-accumulates times weight bits times activation "
        "bits of one example, counted and not measured.",
        f"Train s: of training and validation. {compiling_note(table)}",
        _provenance(records),
    ]


def intervals_note(table: Sequence[Row]) -> str:
    """Returns what the intervals of differences cover, and what their marks and p-values say."""
    compared = [row for row in table if row.difference is not None]
    alone = [row.arm for row in compared if row.difference.over == SEEDS]
    seeds = "the 95% Student-t interval of the mean difference over seeds"
    both = (
        "the 95% interval of the mean difference over seeds and test examples, all of which might "
        "have been others (crossed random effects); it is never narrower than the one over seeds "
        "alone, and one seed (n=1) has that of its test examples alone"
    )
    unkept = (
        f"which one seed (n=1) has not; as no scores of single test examples ({SCORES}) are there, "
        "it does not cover that the test examples might have been others"
    )
    if len(alone) == len(compared):
        covered = f"{seeds}, {unkept}"
    elif alone:
        covered = f"{both}. Of {', '.join(alone)}, {seeds}, {unkept}"
    else:
        covered = both
    return (
        f"In brackets {covered}; * marks an interval without 0, each of which stands alone. "
        "p, Holm: the p-value of no difference, corrected for the number of comparisons in the "
        "table."
    )


def coverage(table: Sequence[Row]) -> str:
    """Returns what the intervals of a table are over, in a few words."""
    return name_coverage(row.difference for row in table if row.difference is not None)


def name_coverage(differences: Iterable[PairedInterval]) -> str:
    """Returns what intervals are over, in a few words."""
    over = {difference.over for difference in differences}
    if over <= {SEEDS}:
        return "over seeds"
    return f"over seeds and test examples{', where scores of these are' if SEEDS in over else ''}"


def against_uniform(records: Sequence[ArmRecord]) -> str:
    """Returns which searches chose the same bits as the uniform search they are compared with.

    "" if none is compared.
    """
    searches: dict[tuple[str, str], dict[int, bool]] = {}
    for record in records:
        if uniform := record.search.get("uniform"):
            names = record.search["name"], uniform["name"]
            searches.setdefault(names, {})[record.seed] = uniform["same"]
    parts = []
    for (name, uniform), by_seed in searches.items():
        for same, policy in ((True, "the same policy as"), (False, "another policy than")):
            if seeds := [str(seed) for seed in sorted(by_seed) if by_seed[seed] == same]:
                word = "seed" if len(seeds) == 1 else "seeds"
                parts.append(f"{name} found {policy} {uniform} with {word} {', '.join(seeds)}")
    return f"{'; '.join(parts)}." if parts else ""


def compiling_note(table: Sequence[Row]) -> str:
    """Returns where the seconds of compiling are: apart, or in those of training."""
    apart = (
        "Compile s: of tracing and compiling programs while an arm was calibrated and trained, not "
        "in Train s; arms that share programs, and later runs that find them kept, compile little."
    )
    trained = [row for row in table if row.train_seconds > 0]
    mixed = [row for row in trained if math.isnan(row.compile_seconds)]
    if not mixed:
        return apart
    if len(mixed) == len(trained):
        return "Train s contains compiling, which old records do not tell apart."
    names = ", ".join(row.arm for row in mixed)
    return f"{apart} The Train s of {names} contains it: their records do not tell it apart."


def quick_note(table: Sequence[Row]) -> str:
    """Returns a warning of the arms of a quick run; "" where there is none."""
    quick = [row.arm for row in table if row.quick]
    if not quick:
        return ""
    if len(quick) == len(table):
        return "A quick run: these numbers mean nothing."
    return f"Of a quick run, so that their numbers mean nothing: {', '.join(quick)}."


def seeds_note(table: Sequence[Row]) -> str:
    """Returns a sentence where no arm has more than one seed; else ""."""
    if not has_one_seed(table):
        return ""
    if any(row.difference and row.difference.over != SEEDS for row in table):
        return (
            "One seed of each arm: no spread is known, and intervals are over test examples alone; "
            "another seed may well lie outside them."
        )
    return "One seed of each arm: no spread or interval is known, and small differences are chance."


def versions_of(records: Sequence[ArmRecord]) -> dict[str, list[str]]:
    """Returns {package: versions, in order of appearance}."""
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in record.versions.items():
            versions.setdefault(package, {})[version] = None
    return {package: list(each) for package, each in versions.items()}


def _provenance(records: Sequence[ArmRecord]) -> str:
    versions = [f"{name} {' and '.join(each)}" for name, each in versions_of(records).items()]
    parts = [
        f"config digest {_digests(records)}",
        f"commit {distinct_text(records, 'commit')}",
        f"versions {', '.join(versions) or 'not recorded'}",
        f"device {distinct_text(records, 'device')}",
        f"seeds {', '.join(map(str, sorted({r.seed for r in records})))}",
    ]
    return "Record: " + "; ".join(parts) + "."


def _digests(records: Sequence[ArmRecord]) -> str:
    """Returns the digest that most arms have, then each other one with its arms."""
    arms: dict[str, dict[str, None]] = {}
    for record in records:
        arms.setdefault(record.config_digest or "not recorded", {})[record.arm] = None
    most, *others = sorted(arms, key=lambda digest: -len(arms[digest]))
    return ", but ".join([most, *(f"{digest} for {', '.join(arms[digest])}" for digest in others)])
