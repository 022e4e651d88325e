"""How measured arms stand to constraints, as tables: methods, ranking, trade-off, what is out."""

import math
from collections.abc import Sequence

from kdq.report.advisor.compare import best
from kdq.report.advisor.constraints import (
    PACKED,
    Check,
    Constraints,
    Fit,
    difference,
    drop,
    mean,
    nearest,
)
from kdq.report.advisor.document import Document
from kdq.report.advisor.evidence import Study
from kdq.report.advisor.rules import METHODS, REQUIREMENTS, TIE
from kdq.report.advisor.words import (
    by_seed,
    compiling_is_within,
    interval,
    label,
    plain,
    seconds,
)
from kdq.report.cells import ABSENT, format_bytes, format_energy
from kdq.report.front import pareto_front

SHOWN = 12  # arms of the ranking


def best_of(fits: Sequence[Fit]) -> Fit:
    """On validation."""
    chosen = best([f.candidate for f in fits])
    return next(f for f in fits if f.candidate is chosen)


def file(one: Fit) -> str:
    """Its size, and its format where that is not kdq's own."""
    form = "" if one.file == PACKED else f" as {one.file}"
    return format_bytes(one.size_bytes) + form


def relax(check: Check) -> str:
    """What would let an arm in."""
    one = REQUIREMENTS[check.requirement]
    if math.isnan(check.value):
        return f"{check.requirement} ({one.fails})"
    # Rounded to four digits, to the side on which the arm fits.
    toward = math.floor if check.requirement == "accuracy" else math.ceil
    digit = 10.0 ** (math.floor(math.log10(check.value)) - 3) if check.value > 0 else 1.0
    value = toward(round(check.value / digit, 6)) * digit
    return f"{check.requirement} from {check.limit:g} to {value:.4g} {one.unit}"


def _time(one: Fit, constraints: Constraints) -> str:
    form, milliseconds = one.fastest(constraints.batch)
    return f"{plain(milliseconds, '.3f')} {form}".strip()


def by_method(
    document: Document, study: Study, fits: Sequence[Fit], groups: list[list[Fit]]
) -> None:
    """One row a method: its best arm that satisfies, or why none does."""
    document.heading("Method by method", 3)
    answer = groups[0][0] if groups else None
    rows = []
    for method in METHODS:
        own = [f for f in fits if f.candidate.method == method]
        if not own:
            rows.append((method, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT, "no arm", ""))
            continue
        good = [f for f in own if f.satisfies]
        one = answer if answer in good else best_of(good or own)
        arm = one.candidate
        delta = None
        if answer is not None and one is not answer:
            delta = difference(arm.validation, answer.candidate.validation)
        rows.append(
            (
                method,
                label(arm, study),
                arm.bits,
                by_seed(arm.validation),
                by_seed(arm.test),
                file(one),
                interval(delta),
                "the answer" if one is answer else _verdict(one),
                document.cite(arm),
            )
        )
    head = ("Method", "Its best arm", "Bits", "Validation %", "Test %", "Size")
    left = ("Method", "Its best arm", "Bits", "Verdict", "Rows")
    document.grid((*head, "Δ validation to the answer", "Verdict", "Rows"), rows, left)


def _verdict(one: Fit) -> str:
    if one.satisfies:
        return "satisfies" if one.certain else "likely satisfies"
    out, unknown = one.named("no"), one.named("?")
    said = [f"ruled out: {', '.join(out)}"] if out else []
    return "; ".join([*said, *([f"not known: {', '.join(unknown)}"] if unknown else [])])


def ranking(
    document: Document, study: Study, groups: list[list[Fit]], constraints: Constraints
) -> None:
    """The arms that satisfy, in groups that tie."""
    document.heading("What satisfies the constraints", 3)
    total = sum(len(group) for group in groups)
    document.say(
        f"{total} of {len(study.candidates)} arms, by validation accuracy. Arms of one rank tie: "
        f"means within {TIE} points of the best's, and a paired interval that contains 0, or one "
        "seed; between these the surest to fit, the simplest method and the shortest training come "
        "first. Sizes are of kdq's packed file and times of the fastest export, unless a format is "
        "named. Training does not count the teacher's; ≈: what the arm starts from is inferred. "
        "The teacher is the one of the arm's own experiment."
        + _compiling([one for group in groups for one in group])
        + ("" if total <= SHOWN else f" The first {SHOWN} are shown."),
    )
    rows = [
        _ranked(document, study, rank_, one, constraints)
        for rank_, group in enumerate(groups, 1)
        for one in group
    ]
    head = ("Rank", "Arm", "Method", "Bits", "Validation %", "Δ teacher", "Test %", "Size")
    head += (f"Batch {constraints.batch}, ms", "Energy, modelled", "Train s", "Fits", "Rows")
    left = ("Arm", "Method", "Bits", "Fits", "Rows")
    document.grid(head, rows[:SHOWN], left)


def _compiling(fits: Sequence[Fit]) -> str:
    mixed = [f.candidate.arm for f in fits if compiling_is_within(f.candidate)]
    if not mixed:
        return " Compiling is not counted."
    names = "all that trained" if len(mixed) == len(fits) else ", ".join(mixed)
    return f" Old records do not tell compiling apart: Train s contains it for {names}."


def _ranked(
    document: Document, study: Study, place: int, one: Fit, constraints: Constraints
) -> tuple[str, ...]:
    arm = one.candidate
    return (
        str(place),
        label(arm, study),
        arm.method,
        arm.bits,
        by_seed(arm.validation),
        interval(drop(arm, study)),
        by_seed(arm.test),
        file(one),
        _time(one, constraints),
        format_energy(arm.energy_nj),
        seconds(arm),
        "yes" if one.certain else "likely",
        document.cite(arm),
    )


def trade_off(
    document: Document, study: Study, fits: Sequence[Fit], constraints: Constraints
) -> None:
    """The arms that are the most accurate on validation at a size, a latency or an energy."""
    document.heading("The trade-off", 3)
    document.say(
        "Of these, the arms that no other one beats in validation accuracy at the same cost or "
        "less, for each cost that was measured."
        + (
            " Equal networks differ in their times, too: small differences of latency mean nothing."
            if study.timed_on
            else ""
        )
    )
    costs = {
        "size": [f.size_bytes for f in fits],
        "latency": [f.milliseconds(constraints.batch) for f in fits],
        "energy": [f.candidate.energy_nj for f in fits],
    }
    on: dict[int, list[str]] = {}
    for name, values in costs.items():
        have = [i for i, value in enumerate(values) if not math.isnan(value)]
        points = [(values[i], mean(fits[i].candidate.validation)) for i in have]
        for i in pareto_front(points):
            on.setdefault(have[i], []).append(name)
    rows = [
        (
            label(fits[i].candidate, study),
            fits[i].candidate.method,
            by_seed(fits[i].candidate.validation),
            by_seed(fits[i].candidate.test),
            file(fits[i]),
            _time(fits[i], constraints),
            format_energy(fits[i].candidate.energy_nj),
            ", ".join(on[i]),
            document.cite(fits[i].candidate),
        )
        for i in sorted(on, key=lambda i: (fits[i].size_bytes, i))
    ]
    head = ("Arm", "Method", "Validation %", "Test %", "Size", f"Batch {constraints.batch}, ms")
    left = ("Arm", "Method", "Best for", "Rows")
    document.grid((*head, "Energy, modelled", "Best for", "Rows"), rows, left)


def ruled_out(document: Document, study: Study, fits: Sequence[Fit], every: Sequence[Fit]) -> None:
    """How many arms each constraint rules out, and what to relax it to for one to fit."""
    document.heading("What is ruled out", 3)
    rows = []
    for name, (count, near) in nearest(fits).items():
        cells = ("none misses this one only", ABSENT, ABSENT, ABSENT, "")
        if near is not None:
            check = next(c for c in near.checks if c.requirement == name)
            arm = near.candidate
            numbers = (by_seed(arm.validation), by_seed(arm.test))
            cells = (relax(check), label(arm, study), *numbers, document.cite(arm))
        rows.append((name, str(count), *cells))
    if rows:
        head = ("Constraint", "Arms out", "Relax", "And this fits", "Validation %", "Test %")
        document.grid((*head, "Rows"), rows, left=("Constraint", "Relax", "And this fits", "Rows"))
    else:
        document.say("Nothing.")
    controls = [f.candidate for f in every if f.candidate.lineage.control]
    if controls:
        names = ", ".join(c.arm for c in controls)
        document.say(f"Controls, with a spoiled teacher, are not considered: {names}.", *controls)
