"""Findings of a study under constraints, as data: the template says them in words."""

import dataclasses
import functools

from kdq.evaluate.statistics import PairedInterval
from kdq.report import metric as metrics
from kdq.report.advisor import gaps, words
from kdq.report.advisor.compare import Finding, findings
from kdq.report.advisor.constraints import (
    Constraints,
    best,
    by_validation,
    closest,
    drop,
    fit,
    gain_of,
    rank,
    shown_mean,
)
from kdq.report.advisor.rules import METHODS, RULES, SEEDS, Rule
from kdq.report.advisor.study import Candidate, Study, Values
from kdq.report.advisor.tables import relax
from kdq.report.aggregate import compare_on_test
from kdq.report.notes import name_coverage
from kdq.report.workdirs import Workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Width:
    """Arms of one experiment, one size of network and one width of numbers."""

    chosen: Candidate
    tied: tuple[Candidate, ...]
    other: Candidate | None  # the best on validation of another method

    @property
    def lead(self) -> PairedInterval | None:
        """The difference of the chosen to the other on test."""
        if self.other is None:
            return None
        return compare_on_test(self.chosen, self.other)[0]

    @property
    def doubtful(self) -> bool:
        """Returns whether there are seeds enough for a lead, which test does not confirm."""
        gain = gain_of(self.lead, self.chosen.metric)
        confirmed = gain is not None and gain.n >= SEEDS and gain.low > 0
        return not confirmed and len(self.chosen.seeds) >= SEEDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The widths of one experiment and network at which several methods were tried."""

    source: Workdir
    params: int
    widths: tuple[Width, ...]

    @property
    def few(self) -> bool:
        """Returns whether there are too few seeds for a claim."""
        return any(len(width.chosen.seeds) < SEEDS for width in self.widths)

    @property
    def cited(self) -> list[Candidate]:
        """The arms that are compared."""
        return [arm for width in self.widths for arm in (width.chosen, width.other)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """A rule with those of its findings in an experiment that say the same."""

    text: str
    source: Workdir
    rule: Rule
    findings: tuple[Finding, ...]
    many: bool  # whether the rule has findings on networks of several sizes


class Advice:
    """Findings of one study.

    Attributes:
      fits, controls: how arms stand to the constraints; those with a spoiled teacher, apart.
      groups: the arms that satisfy, the best first, in groups that tie.
      answer, method, tied: the arm to use and its method, and those that tie with it.
      drop_on_test, holds_on_test: the answer's metric on test less its teacher's, and whether what
        was asked of the metric holds there; None if nothing was.
      unjudged: arms that nothing rules out, but that can't be judged.
      closest: the arm that misses least.
      findings: of the rules, by experiment.
      coverage: what the intervals of these are over.
    """

    def __init__(self, study: Study, constraints: Constraints):
        self.study, self.constraints, self.metric = study, constraints, study.metric
        self.name, self.units = metrics.named(study.metric), metrics.units_phrase(study.metric)
        self.words = metrics.words(study.metric)
        every = [fit(candidate, constraints, study) for candidate in study.candidates]
        self.fits = [f for f in every if not f.candidate.lineage.control]
        self.controls = [f.candidate for f in every if f.candidate.lineage.control]
        self.groups = rank([f for f in self.fits if f.satisfies])
        self.satisfying = [f for group in self.groups for f in group]
        self.answer = self.satisfying[0] if self.groups else None
        if self.answer:
            self._judge_answer(self.answer.candidate)
        self.unjudged = [f for f in self.fits if f.named("?") and not f.named("no")]
        self.closest = closest(self.fits)
        self.findings = {source: findings(study, source) for source in study.sources}
        compared = [finding.difference for each in self.findings.values() for finding in each]
        self.coverage = name_coverage(compared)
        self.gaps = gaps.find_gaps(study, self.fits, self.findings, constraints)

    def _judge_answer(self, arm: Candidate) -> None:
        self.method = METHODS[arm.method]
        self.tied = [f.candidate for f in self.groups[0][1:]]
        teacher, self.drop_on_test = self.study.teacher(arm.source), None
        if teacher is not None:
            self.drop_on_test, _ = compare_on_test(arm, teacher)
        limits, sign = self.constraints, 1 if self.metric.higher_is_better else -1
        holds = []
        if limits.min_accuracy is not None:
            holds.append(sign * shown_mean(arm.test, self.metric) >= sign * limits.min_accuracy)
        if limits.max_drop is not None and self.drop_on_test is not None:
            holds.append(sign * self.drop_on_test.mean >= -limits.max_drop)
        self.holds_on_test = all(holds) if holds else None

    def value(self, values: Values) -> str:
        """Returns a metric over seeds within a sentence."""
        return words.in_sentence(values, self.metric)

    def by_seed(self, values: Values) -> str:
        """Returns a metric over seeds in a table."""
        return words.by_seed(values, self.metric)

    def interval(self, difference: PairedInterval | None) -> str:
        """Returns a difference with its interval."""
        return words.interval(difference, self.metric)

    def drop(self, arm: Candidate) -> PairedInterval | None:
        """Returns an arm's metric on validation less that of its teacher."""
        return drop(arm, self.study)

    def teacher_apart(self, arm: Candidate) -> list[Candidate]:
        """Returns the teacher of an arm that is not the teacher."""
        teacher = self.study.teacher(arm.source)
        return [] if teacher in (None, arm) else [teacher]

    @property
    def quick(self) -> list[str]:
        """Arms of quick runs."""
        return list(dict.fromkeys(r.arm for s in self.study.sources for r in s.records if r.quick))

    @property
    def unjudged_best(self) -> Candidate:
        """The best on validation of those that can't be judged."""
        return best([f.candidate for f in self.unjudged])

    @property
    def closest_misses(self) -> list[str]:
        """Words that say how to relax what the closest arm misses."""
        return [relax(c, self.metric) for c in self.closest.checks if c.state == "no"]

    @property
    def compiled_within(self) -> str:
        """Arms whose seconds of training contain compiling."""
        mixed = [f.candidate.arm for f in self.satisfying if f.candidate.compiling_is_within]
        every = len(mixed) == len(self.satisfying)
        return ("all that trained" if every else ", ".join(mixed)) if mixed else ""

    @functools.cached_property
    def widths(self) -> list[Width]:
        """The simplest of the best arms, of each experiment, network and width."""
        groups: dict[tuple[Workdir, int, str], list[Candidate]] = {}
        for arm in self.study.candidates:
            if arm.kind != "teacher" and not arm.lineage.control:
                groups.setdefault((arm.source, arm.params, arm.bits), []).append(arm)
        widths = []
        for arms in groups.values():
            leaders = rank([fit(arm, Constraints(), self.study) for arm in arms])[0]
            first, *tied = (f.candidate for f in leaders)
            ordered = sorted(arms, key=by_validation)
            other = next((arm for arm in ordered if arm.method != first.method), None)
            widths.append(Width(chosen=first, tied=tuple(tied), other=other))
        return widths

    @property
    def in_short(self) -> list[Summary]:
        """The widths at which several methods were tried, by experiment and network."""
        groups: dict[tuple[Workdir, int], list[Width]] = {}
        for width in self.widths:
            if width.other is not None:
                key = width.chosen.source, width.chosen.params
                groups.setdefault(key, []).append(width)
        return [
            Summary(source=source, params=params, widths=tuple(widths))
            for (source, params), widths in groups.items()
        ]

    def statements(self, question: str) -> list[Statement]:
        """Returns what the rules of a question say: one statement for each verdict."""
        statements = []
        for source, every in self.findings.items():
            for rule in (rule for rule in RULES if rule.question == question):
                matching = [f for f in every if f.rule is rule]
                for verdict in ("above", "level", "below", "undecided", "seen"):
                    agreeing = tuple(f for f in matching if f.verdict == verdict)
                    if agreeing:
                        statements.append(
                            Statement(
                                text=self._heading(rule, verdict),
                                source=source,
                                rule=rule,
                                findings=agreeing,
                                many=len({f.a.params for f in matching}) > 1,
                            )
                        )
        return statements

    def _heading(self, rule: Rule, verdict: str) -> str:
        others = {
            "undecided": f"Not decided, {rule.name}",
            "seen": f"Seen, but in too few seeds for a claim, {rule.name}",
        }
        return others.get(verdict) or getattr(rule, verdict).format(**self.words)
