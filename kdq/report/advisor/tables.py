"""Tables of the advisor: methods, ranking, trade-off, what is ruled out, and each width."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdq.report.advisor import words
from kdq.report.advisor.constraints import Check, Fit, best, merit, nearest
from kdq.report.advisor.document import Line, Table
from kdq.report.advisor.rules import METHODS, REQUIREMENTS
from kdq.report.advisor.study import Candidate
from kdq.report.aggregate import compare_on_test, interval_of
from kdq.report.cells import ABSENT, format_energy
from kdq.report.front import pareto_front
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.report.advisor.advice import Advice

SHOWN = 12  # arms of the ranking


def relax(check: Check, metric: Metric) -> str:
    """Returns what would let an arm in."""
    requirement = REQUIREMENTS[check.requirement]
    if math.isnan(check.value):
        return f"{check.requirement} ({requirement.fails})"
    units = {"accuracy": metric.unit, "drop": metric.difference_unit}
    unit = units.get(check.requirement, requirement.unit)
    # Rounded to four digits, to the side on which the arm fits.
    least = check.requirement == "accuracy" and metric.higher_is_better
    digit = 10.0 ** (math.floor(math.log10(check.value)) - 3) if check.value > 0 else 1.0
    value = (math.floor if least else math.ceil)(round(check.value / digit, 6)) * digit
    return f"{check.requirement} from {check.limit:g} to {value:.4g} {unit}"


def by_method(advice: "Advice") -> Table:
    """Returns one row a method: its best arm that satisfies, or why none does."""
    answer = advice.answer
    lines: list[Line] = []
    for method in METHODS:
        fits = [f for f in advice.fits if f.candidate.method == method]
        if not fits:
            lines.append(((method, *[ABSENT] * 6, "no arm"), ()))
            continue
        good = [f for f in fits if f.satisfies]
        shown = answer if answer in good else _best_fit(good or fits)
        arm, delta = shown.candidate, None
        if answer is not None and shown is not answer:
            delta = interval_of(arm.validation, answer.candidate.validation, advice.metric)
        cells = (
            method,
            advice.study.label(arm),
            arm.bits,
            *_scores(advice, arm),
            words.file(shown),
            advice.interval(delta),
            "the answer" if shown is answer else _verdict(shown),
        )
        lines.append((cells, (arm,)))
    head = ("Method", "Its best arm", "Bits", *_heads(advice), "Size")
    left = ("Method", "Its best arm", "Bits", "Verdict")
    return Table((*head, "Δ validation to the answer", "Verdict"), left, lines)


def _best_fit(fits: Sequence[Fit]) -> Fit:
    chosen = best([f.candidate for f in fits])
    return next(f for f in fits if f.candidate is chosen)


def _scores(advice: "Advice", arm: Candidate) -> tuple[str, str]:
    return advice.by_seed(arm.validation), advice.by_seed(arm.test)


def _heads(advice: "Advice") -> tuple[str, str]:
    unit = advice.metric.unit
    return f"Validation {unit}".rstrip(), f"Test {unit}".rstrip()


def _verdict(fit: Fit) -> str:
    if fit.satisfies:
        return "satisfies" if fit.certain else "likely satisfies"
    out, unknown = fit.named("no"), fit.named("?")
    parts = [f"ruled out: {', '.join(out)}"] if out else []
    return "; ".join([*parts, *([f"not known: {', '.join(unknown)}"] if unknown else [])])


def ranking(advice: "Advice") -> Table:
    """Returns the arms that satisfy, in groups that tie."""
    batch = advice.constraints.batch
    lines: list[Line] = []
    for place, group in enumerate(advice.groups, 1):
        for fit in group:
            arm = fit.candidate
            validation, test = _scores(advice, arm)
            cells = (
                *(str(place), advice.study.label(arm), arm.method, arm.bits),
                *(validation, advice.interval(advice.drop(arm)), test),
                *(words.file(fit), words.latency(fit, batch)),
                *(format_energy(arm.energy_modelled_nj), words.seconds(arm)),
                "yes" if fit.certain else "likely",
            )
            lines.append((cells, (arm,)))
    validation, test = _heads(advice)
    head = ("Rank", "Arm", "Method", "Bits", validation, "Δ teacher", test, "Size")
    head += (f"Batch {batch}, ms", "Energy, modelled", "Train s", "Fits")
    return Table(head, ("Arm", "Method", "Bits", "Fits"), lines[:SHOWN])


def trade_off(advice: "Advice") -> Table:
    """Returns the arms that are the best on validation at a size, a latency or an energy."""
    fits = [fit for group in advice.groups for fit in group]
    batch = advice.constraints.batch
    costs = {
        "size": [f.size_bytes for f in fits],
        "latency": [f.milliseconds(batch) for f in fits],
        "energy": [f.candidate.energy_modelled_nj for f in fits],
    }
    best_for: dict[int, list[str]] = {}
    for name, values in costs.items():
        measured = [i for i, value in enumerate(values) if not math.isnan(value)]
        points = [(values[i], merit(fits[i].candidate)) for i in measured]
        for i in pareto_front(points):
            best_for.setdefault(measured[i], []).append(name)
    lines: list[Line] = []
    for i in sorted(best_for, key=lambda i: (fits[i].size_bytes, i)):
        arm = fits[i].candidate
        cells = (
            *(advice.study.label(arm), arm.method, *_scores(advice, arm)),
            *(words.file(fits[i]), words.latency(fits[i], batch)),
            *(format_energy(arm.energy_modelled_nj), ", ".join(best_for[i])),
        )
        lines.append((cells, (arm,)))
    head = ("Arm", "Method", *_heads(advice), "Size", f"Batch {batch}, ms")
    return Table((*head, "Energy, modelled", "Best for"), ("Arm", "Method", "Best for"), lines)


def ruled_out(advice: "Advice") -> Table:
    """Returns how many arms each constraint rules out, and how to relax it for one to fit."""
    lines: list[Line] = []
    for name, (count, near) in nearest(advice.fits).items():
        cells, cited = ("none misses this one only", *[ABSENT] * 3), ()
        if near is not None:
            check = next(c for c in near.checks if c.requirement == name)
            arm = near.candidate
            cells = (relax(check, advice.metric), advice.study.label(arm), *_scores(advice, arm))
            cited = (arm,)
        lines.append(((name, str(count), *cells), cited))
    head = ("Constraint", "Arms out", "Relax", "And this fits", *_heads(advice))
    return Table(head, ("Constraint", "Relax", "And this fits"), lines)


def by_width(advice: "Advice") -> Table:
    """Returns the method to use at each width, and its lead over the other methods."""
    lines: list[Line] = []
    for width in advice.widths:
        first, other = width.chosen, width.other
        teacher = advice.study.teacher(first.source)
        delta = None
        if teacher is not None:
            delta, _ = compare_on_test(first, teacher)
        methods = dict.fromkeys(c.method for c in width.tied if c.method != first.method)
        cells = (
            *(first.source.name, f"{first.params:,}", first.bits, first.method, first.arm),
            ", ".join(methods) or ABSENT,
            *_scores(advice, first),
            advice.interval(delta),
            ABSENT if other is None else f"{other.arm} ({other.method})",
            advice.interval(width.lead),
        )
        lines.append((cells, [c for c in (first, other, teacher) if c is not None]))
    head = ("Experiment", "Parameters", "Width", "Use", "Arm", "Methods that tie")
    head += (*_heads(advice), "Test, against the teacher", "Best of another method")
    left = ("Experiment", "Width", "Use", "Arm", "Methods that tie", "Best of another method")
    return Table((*head, "Lead on test"), left, lines)
