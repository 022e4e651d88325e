"""What a reader must know to use the table: definitions, selection, and the record of the runs."""

import math
from collections.abc import Sequence

from kdq.report import Record
from kdq.report.aggregate import Row


def notes(table: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """One paragraph a note, as plain text."""
    missing = [
        f"{row.arm} (against {row.reference}: {row.no_difference})"
        for row in table
        if row.no_difference
    ]
    return [
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
        _times(table),
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


def _times(table: Sequence[Row]) -> str:
    said = (
        "Train s: of training and validation, without compiling. Compile s: of tracing and "
        "compiling programs while an arm was calibrated and trained; arms that share programs, and "
        "later runs that find them kept, compile little."
    )
    mixed = [row.arm for row in table if compiling_is_within(row)]
    if len(mixed) == len([row for row in table if row.train_seconds > 0]):
        names = "every arm" if mixed else ""
    else:
        names = ", ".join(mixed)
    if names:
        said += (
            f" The records of {names} are of a version that did not tell them apart: their Train s "
            "contains compiling."
        )
    return said


def quick_note(table: Sequence[Row]) -> str:
    """Returns what is to be said of the arms of a quick run; "" where there is none."""
    quick = [row.arm for row in table if row.quick]
    if not quick:
        return ""
    if len(quick) == len(table):
        return "A quick run: these numbers mean nothing."
    return f"Of a quick run, so that their numbers mean nothing: {', '.join(quick)}."


def compiling_is_within(row: Row) -> bool:
    """Returns whether an arm's seconds of training contain those of compiling."""
    return row.train_seconds > 0 and math.isnan(row.compile_seconds)


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
