"""When to distill, when to quantize, when to do both: what the records of a study say."""

import dataclasses
from collections.abc import Sequence

from kdq.evaluate.statistics import PairedInterval
from kdq.report.advisor.compare import Finding, by_validation
from kdq.report.advisor.constraints import Constraints, difference, fit, rank
from kdq.report.advisor.document import Document
from kdq.report.advisor.evidence import Candidate, Source, Study
from kdq.report.advisor.rules import LEVEL, QUESTIONS, RULES, SEEDS, Rule
from kdq.report.advisor.words import by_seed, interval, width
from kdq.report.cells import ABSENT


def write(document: Document, study: Study, findings: dict[Source, list[Finding]]) -> None:
    """Adds the answers to the three questions, and the method to use at each width."""
    document.heading("When to distill, when to quantize, when to do both", 3)
    widths = _widths(study)
    _in_short(document, widths)
    document.say(
        "At each width, the simplest of the arms that tie with the best on validation, among all "
        "that were measured and without constraints. The lead is on test, over the best arm on "
        "validation of the other methods at this width."
    )
    _table(document, study, widths)
    document.say(
        "What the rules say: differences are accuracy points on test, paired by seed, with 95% "
        "intervals that stand each alone; of a method the arm that is best on validation is "
        f"compared. Level: the interval contains 0 and lies within ±{LEVEL:g} point."
    )
    for question, title in QUESTIONS.items():
        document.heading(title, 4)
        said = False
        for source, found in findings.items():
            for rule in (rule for rule in RULES if rule.question == question):
                of_rule = [f for f in found if f.rule is rule]
                _say(document, source, rule, of_rule)
                said = said or bool(of_rule)
        if not said:
            document.say("No two arms answer this; see what is missing.")


def _say(document: Document, source: Source, rule: Rule, found: Sequence[Finding]) -> None:
    """One item for each verdict, with all widths of it."""
    many = len({f.a.params for f in found}) > 1
    for verdict in ("above", "level", "below", "undecided", "seen"):
        own = [f for f in found if _heading(f) == verdict]
        if not own:
            continue
        text = {
            "undecided": f"Not decided, {rule.name}",
            "seen": f"Seen, but in too few seeds for a claim, {rule.name}",
        }.get(verdict) or getattr(rule, verdict)
        parts = "; ".join(_part(document, f, many) for f in own)
        caution = f" {rule.caution}." if rule.caution else ""
        document.say(
            f"{text} ({source.name}): {parts}.{caution} Sources: {rule.source}.", kind="item"
        )


def _heading(finding: Finding) -> str:
    return "seen" if finding.difference.n < SEEDS else finding.verdict


def _part(document: Document, finding: Finding, many: bool) -> str:
    """One width: the difference, whose it is, and what else is unequal."""
    a, b = finding.a, finding.b
    size = f" ({a.params:,} parameters)" if many else ""
    steps = ""
    if a.steps > 0 and b.steps > 0 and a.steps != b.steps:
        steps = f" in {a.steps:.0f} steps against {b.steps:.0f}"
    return (
        f"{width(a.bits)}{size} {interval(finding.difference)}, {a.arm} against {b.arm}{steps} "
        f"{document.cite(a, b)}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Width:
    """Arms of one experiment, one size of network and one width."""

    chosen: Candidate
    tied: tuple[Candidate, ...]
    other: Candidate | None  # the best on validation of another method

    @property
    def lead(self) -> PairedInterval | None:
        """Of the chosen over the other, points on test."""
        return None if self.other is None else difference(self.chosen.test, self.other.test)

    @property
    def confirmed(self) -> bool:
        """Whether test says the same."""
        return self.lead is not None and self.lead.n >= SEEDS and self.lead.low > 0


def _widths(study: Study) -> list[_Width]:
    groups: dict[tuple[Source, int, str], list[Candidate]] = {}
    for one in study.candidates:
        if one.kind != "teacher" and not one.lineage.control:
            groups.setdefault((one.source, one.params, one.bits), []).append(one)
    found = []
    for here in groups.values():
        ranked = rank([fit(c, Constraints(), study) for c in here])
        first, *tied = (f.candidate for f in ranked[0])
        ordered = sorted(here, key=by_validation)
        other = next((c for c in ordered if c.method != first.method), None)
        found.append(_Width(chosen=first, tied=tuple(tied), other=other))
    return found


def _in_short(document: Document, widths: Sequence[_Width]) -> None:
    """A sentence an experiment and network, of the widths at which several methods were tried."""
    groups: dict[tuple[Source, int], list[_Width]] = {}
    for one in widths:
        if one.other is not None:
            groups.setdefault((one.chosen.source, one.chosen.params), []).append(one)
    for (source, params), own in groups.items():
        parts, cited = [], []
        for one in own:
            doubt = ""
            if not one.confirmed and len(one.chosen.seeds) >= SEEDS:
                doubt = f" (test does not confirm a lead over {one.other.method})"
            parts.append(f"{width(one.chosen.bits)} {one.chosen.method}{doubt}")
            cited += [one.chosen, one.other]
        few = any(len(one.chosen.seeds) < SEEDS for one in own)
        claim = ", in too few seeds for a claim" if few else ""
        document.say(
            f"In short, {source.name}, {params:,} parameters{claim}: {'; '.join(parts)}.",
            *cited,
            kind="strong",
        )


def _table(document: Document, study: Study, widths: Sequence[_Width]) -> None:
    rows = []
    for one in widths:
        first, other, teacher = one.chosen, one.other, study.teacher(one.chosen.source)
        methods = dict.fromkeys(c.method for c in one.tied if c.method != first.method)
        rows.append(
            (
                first.source.name,
                f"{first.params:,}",
                first.bits,
                first.method,
                first.arm,
                ", ".join(methods) or ABSENT,
                by_seed(first.validation),
                by_seed(first.test),
                ABSENT if teacher is None else interval(difference(first.test, teacher.test)),
                ABSENT if other is None else f"{other.arm} ({other.method})",
                interval(one.lead),
                document.cite(*(c for c in (first, other, teacher) if c is not None)),
            )
        )
    head = ("Experiment", "Parameters", "Width", "Use", "Arm", "Methods that tie", "Validation %")
    head += ("Test %", "Test, against the teacher", "Best of another method", "Lead on test")
    left = ("Experiment", "Width", "Use", "Arm", "Methods that tie", "Best of another method")
    document.grid((*head, "Rows"), rows, (*left, "Rows"))
