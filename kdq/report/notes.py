"""What a reader must know to use the table: definitions, selection, and the record of the runs."""

import math
from collections.abc import Sequence

from kdq.report import Record
from kdq.report.aggregate import Row, one_seed


def notes(table: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """One paragraph a note, as plain text."""
    missing = [
        f"{row.arm} (against {row.reference}: {row.no_difference})"
        for row in table
        if row.no_difference
    ]
    return [
        *filter(None, [seeds_note(table)]),
        "Accuracy: on the test split, in percent, mean ± sample standard deviation over seeds, at "
        "the selected step; test data selects nothing.",
        "Selected on: what chose the step, by the highest accuracy there and, between equals, the "
        "lowest negative log-likelihood. An arm that is only calibrated has nothing to choose.",
        "Δ: accuracy points above the arm named beside it, paired by seed over the seeds that both "
        "finished. In brackets the 95% Student-t interval of the mean difference, which one seed "
        "(n=1) has not; * marks an interval without 0. Each interval stands alone: none is "
        "corrected for the number of rows.",
        *([f"Against uniform bits: {said}"] if (said := against_uniform(records)) else []),
        *([f"No difference for: {', '.join(missing)}."] if missing else []),
        "Size: bytes of the model's file on disk, mean over seeds; 1 KiB is 1024 bytes. Smaller: "
        "the size of the baseline (the teacher, unless another was named) over this one.",
        "Agreement: share of test examples on which arm and teacher predict the same class. KL: "
        "KL(teacher ‖ arm), nats. BOPs: multiply-accumulates times weight bits times activation "
        "bits of one image, counted and not measured.",
        f"Train s: of training and validation. {compiling_note(table)}",
        _provenance(records),
    ]


def against_uniform(records: Sequence[Record]) -> str:
    """Returns which searches found the bits of the uniform search that they are compared with, and
    which found others; "" if none is compared."""
    searches: dict[tuple[str, str], dict[int, bool]] = {}
    for record in records:
        if uniform := (record.get("search") or {}).get("uniform"):
            names = record["search"]["name"], uniform["name"]
            searches.setdefault(names, {})[record["seed"]] = uniform["same"]
    said = []
    for (name, uniform), by_seed in searches.items():
        for same, policy in ((True, "the same policy as"), (False, "another policy than")):
            if seeds := [str(seed) for seed in sorted(by_seed) if by_seed[seed] == same]:
                word = "seed" if len(seeds) == 1 else "seeds"
                said.append(f"{name} found {policy} {uniform} with {word} {', '.join(seeds)}")
    return f"{'; '.join(said)}." if said else ""


def compiling_note(table: Sequence[Row]) -> str:
    """Returns where the seconds of compiling are: apart, or in those of training."""
    said = (
        "Compile s: of tracing and compiling programs while an arm was calibrated and trained, not "
        "in Train s; arms that share programs, and later runs that find them kept, compile little."
    )
    trained = [row for row in table if row.train_seconds > 0]
    mixed = [row for row in trained if math.isnan(row.compile_seconds)]
    if not mixed:
        return said
    if len(mixed) == len(trained):
        return "Train s contains compiling, which old records do not tell apart."
    names = ", ".join(row.arm for row in mixed)
    return f"{said} The Train s of {names} contains it: their records do not tell it apart."


def quick_note(table: Sequence[Row]) -> str:
    """Returns what is to be said of the arms of a quick run; "" where there is none."""
    quick = [row.arm for row in table if row.quick]
    if not quick:
        return ""
    if len(quick) == len(table):
        return "A quick run: these numbers mean nothing."
    return f"Of a quick run, so that their numbers mean nothing: {', '.join(quick)}."


def seeds_note(table: Sequence[Row]) -> str:
    """Returns what is to be said once where no arm has more than one seed; else ""."""
    if not one_seed(table):
        return ""
    return "One seed of each arm: no spread or interval is known, and small differences are chance."


def _provenance(records: Sequence[Record]) -> str:
    versions: dict[str, list[str]] = {}
    for record in records:
        for package, version in (record.get("versions") or {}).items():
            known = versions.setdefault(package, [])
            if str(version) not in known:
                known.append(str(version))
    parts = [
        f"config digest {_digests(records)}",
        f"commit {_distinct(records, 'commit')}",
        "versions "
        + (", ".join(f"{p} {' and '.join(v)}" for p, v in versions.items()) or "not recorded"),
        f"device {_distinct(records, 'device')}",
        f"seeds {', '.join(map(str, sorted({r['seed'] for r in records})))}",
    ]
    return "Record: " + "; ".join(parts) + "."


def _distinct(records: Sequence[Record], key: str) -> str:
    values = dict.fromkeys(str(r[key]) for r in records if r.get(key))
    return " and ".join(values) or "not recorded"


def _digests(records: Sequence[Record]) -> str:
    """The digest that most arms have, then each other one with its arms."""
    arms: dict[str, dict[str, None]] = {}
    for record in records:
        arms.setdefault(str(record.get("config_digest") or "not recorded"), {})[record["arm"]] = (
            None
        )
    most, *others = sorted(arms, key=lambda digest: -len(arms[digest]))
    return ", but ".join([most, *(f"{digest} for {', '.join(arms[digest])}" for digest in others)])
