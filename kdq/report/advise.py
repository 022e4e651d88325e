"""The advisor: given constraints and records, which of the methods to use, and on what evidence.

Arms are selected on validation; test accuracy stands beside it, for what one may expect.
"""

from collections.abc import Sequence

from kdq.report.advisor import conclude, gaps, standing
from kdq.report.advisor.compare import findings
from kdq.report.advisor.constraints import (
    Constraints,
    Fit,
    closest,
    difference,
    drop,
    fit,
    mean,
    rank,
)
from kdq.report.advisor.document import Document
from kdq.report.advisor.evidence import Source, Study, studies
from kdq.report.advisor.rules import METHODS, SEEDS
from kdq.report.advisor.words import interval, label, percent


def advise(sources: Sequence[Source], constraints: Constraints) -> Document:
    """The report: an answer for each group of records that may be compared.

    Args:
      sources: from `kdq.report.advisor.evidence.read`.
      constraints: what has to hold.
    """
    document = Document()
    document.heading("Distill, quantize, or both?")
    document.say(f"Constraints: {constraints}.")
    found = studies(sources)
    if len(found) > 1:
        document.say(
            f"The records are of {len(found)} studies: of other data, or timed on another device. "
            "They are kept apart, and nothing is compared between them."
        )
    for number, study in enumerate(found, 1):
        _study(document, number, study, constraints)
    document.heading("Rows", 2)
    document.say("What the numbers in brackets refer to.")
    document.references()
    return document


def _study(document: Document, number: int, study: Study, constraints: Constraints) -> None:
    names = ", ".join(source.name for source in study.sources)
    document.heading(f"Study {number}: {names}", 2)
    digests = ", ".join(f"{split} {digest[:8]}" for split, digest in study.data.items())
    timed = f"Latencies are of: {study.timed_on}." if study.timed_on else "Nothing was timed."
    document.say(f"Digests of the data: {digests}. {timed}")
    quick = dict.fromkeys(r["arm"] for s in study.sources for r in s.records if r.get("quick"))
    if quick:
        names = ", ".join(quick)
        document.say(f"Of a quick run, so that their numbers mean nothing: {names}.", kind="strong")
    every = [fit(c, constraints, study) for c in study.candidates]
    fits = [f for f in every if not f.candidate.lineage.control]
    groups = rank([f for f in fits if f.satisfies])
    document.heading("Answer", 3)
    if groups:
        _answer(document, study, groups, constraints)
    else:
        _no_answer(document, study, fits)
    if fits:
        standing.by_method(document, study, fits, groups)
    if groups:
        standing.ranking(document, study, groups, constraints)
        standing.trade_off(document, study, [f for group in groups for f in group], constraints)
    standing.ruled_out(document, study, fits, every)
    found = {source: findings(study, source) for source in study.sources}
    if fits:
        conclude.write(document, study, found)
    gaps.write(document, study, fits, found, constraints)


def _answer(
    document: Document, study: Study, groups: list[list[Fit]], constraints: Constraints
) -> None:
    first, *tied = groups[0]
    arm, teacher = first.candidate, study.teacher(first.candidate.source)
    method = METHODS[arm.method]
    against = [] if teacher in (None, arm) else [teacher]
    below = f", {interval(drop(arm, study))} points against the teacher" if against else ""
    document.say(
        f"Use {method.name}: {method.says}. {label(arm, study)} ({arm.bits}, "
        f"{arm.params:,} parameters, {standing.file(first)}) "
        f"{'satisfies' if first.certain else 'likely satisfies'} the constraints: "
        f"{percent(arm.validation)} on validation{below}.",
        arm,
        *against,
        kind="strong",
    )
    document.say(_on_test(first, study, constraints), arm, *against)
    if not first.certain:
        names = ", ".join(first.named("likely"))
        why = (
            "there is one seed" if len(arm.seeds) == 1 else "not all of the 95% interval over seeds"
        )
        document.say(f"Likely: the mean is within the limit of {names}, but {why}.", arm)
    if len(arm.seeds) < SEEDS:
        document.say(f"Fewer than {SEEDS} seeds: that it is ahead of others is no evidence.", arm)
    if tied:
        names = ", ".join(label(f.candidate, study) for f in tied)
        document.say(
            f"On validation it ties with {names}; of these it is the surest to fit, and between "
            "equally sure ones the simplest method, then the one that trains for less time.",
            arm,
            *(f.candidate for f in tied),
        )


def _on_test(first: Fit, study: Study, constraints: Constraints) -> str:
    """What to expect, and whether what was asked of the accuracy holds there as well."""
    arm, teacher = first.candidate, study.teacher(first.candidate.source)
    text = f"On test it has {percent(arm.test)}"
    below = None if teacher is None else difference(arm.test, teacher.test)
    if below is not None and teacher is not arm:
        text += f", {interval(below)} points against the teacher"
    held = []
    if constraints.min_accuracy is not None:
        held.append(mean(arm.test) >= constraints.min_accuracy)
    if constraints.max_drop is not None and below is not None:
        held.append(below.mean >= -constraints.max_drop)
    if held:
        text += ": what was asked holds there too" if all(held) else ": NOT what was asked"
    return text + "."


def _no_answer(document: Document, study: Study, fits: Sequence[Fit]) -> None:
    document.say("Nothing that was measured satisfies the constraints.", kind="strong")
    unknown = [f for f in fits if f.named("?") and not f.named("no")]
    if unknown:
        names = sorted({name for f in unknown for name in f.named("?")})
        arm = standing.best_of(unknown).candidate
        document.say(
            f"{len(unknown)} arms may: nothing rules them out, but {', '.join(names)} can't be "
            f"judged of them. The best of these on validation is {label(arm, study)}, with "
            f"{percent(arm.validation)}.",
            arm,
        )
    near = closest(fits)
    if near is not None:
        arm, fits_then = near.candidate, "may fit" if near.named("?") else "fits"
        misses = " and ".join(standing.relax(c) for c in near.checks if c.state == "no")
        document.say(
            f"Relax {misses}, and {label(arm, study)} ({arm.method}, {arm.bits}) {fits_then}: "
            f"{percent(arm.validation)} on validation, {percent(arm.test)} on test.",
            arm,
        )
