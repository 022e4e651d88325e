"""What follows from a study under constraints, as data: the template says it in words."""

import dataclasses
import functools
from collections.abc import Sequence

from kdq.evaluate.statistics import PairedInterval
from kdq.report import metric as metrics
from kdq.report.advisor import gaps, words
from kdq.report.advisor.compare import Finding, findings
from kdq.report.advisor.constraints import (
    Constraints,
    Fit,
    best,
    by_validation,
    closest,
    drop,
    fit,
    gain_of,
    rank,
    shown_mean,
)
from kdq.report.advisor.rules import METHODS, RULES, SEEDS, Method, Rule
from kdq.report.advisor.study import Candidate, Study, Values
from kdq.report.advisor.tables import relax
from kdq.report.aggregate import interval_of
from kdq.report.workdirs import Workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Width:
    """Arms of one experiment, one size of network and one width of numbers."""

    chosen: Candidate
    tied: tuple[Candidate, ...]
    other: Candidate | None  # the best on validation of another method

    @property
    def lead(self) -> PairedInterval | None:
        """Of the chosen over the other, on test."""
        if self.other is None:
            return None
        return interval_of(self.chosen.test, self.other.test, self.chosen.metric)

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
    """Findings of one study."""

    def __init__(self, study: Study, constraints: Constraints):
        self.study, self.constraints, self.metric = study, constraints, study.metric
        self.name, self.units = metrics.named(study.metric), metrics.units_phrase(study.metric)
        self.words = metrics.words(study.metric)
        every = [fit(candidate, constraints, study) for candidate in study.candidates]
        self.fits = [f for f in every if not f.candidate.lineage.control]
        self.controls = [f.candidate for f in every if f.candidate.lineage.control]
        self.satisfying = [f for f in self.fits if f.satisfies]
        self.groups = rank(self.satisfying)
        self.findings = {source: findings(study, source) for source in study.sources}

    # How the metric is worded.

    def value(self, values: Values) -> str:
        """Returns a metric over seeds within a sentence."""
        return words.in_sentence(values, self.metric)

    def by_seed(self, values: Values) -> str:
        """Returns a metric over seeds in a table."""
        return words.by_seed(values, self.metric)

    def interval(self, difference: PairedInterval | None) -> str:
        """Returns a difference with its interval."""
        return words.interval(difference, self.metric)

    @property
    def level_unit(self) -> str:
        """The unit of "level", in words."""
        unit = self.metric.difference_unit
        return unit[:-1] if unit == "points" and self.metric.level == 1 else unit

    # Of the study.

    @property
    def digests(self) -> str:
        """Digests of the data."""
        return ", ".join(f"{split} {digest[:8]}" for split, digest in self.study.data.items())

    @property
    def quick(self) -> list[str]:
        """Arms of quick runs."""
        return list(dict.fromkeys(r.arm for s in self.study.sources for r in s.records if r.quick))

    # The answer.

    @property
    def answer(self) -> Fit | None:
        """The arm to use; None where nothing satisfies the constraints."""
        return self.groups[0][0] if self.groups else None

    @property
    def method(self) -> Method:
        """The answer's method."""
        return METHODS[self.answer.candidate.method]

    @property
    def tied(self) -> list[Candidate]:
        """Arms that can't be told apart from the answer."""
        return [f.candidate for f in self.groups[0][1:]]

    def drop(self, arm: Candidate) -> PairedInterval | None:
        """Returns an arm's metric on validation less that of its teacher."""
        return drop(arm, self.study)

    def teacher_apart(self, arm: Candidate) -> list[Candidate]:
        """Returns the teacher of an arm that is not the teacher."""
        teacher = self.study.teacher(arm.source)
        return [] if teacher in (None, arm) else [teacher]

    @functools.cached_property
    def drop_on_test(self) -> PairedInterval | None:
        """The answer's metric on test less that of its teacher."""
        arm = self.answer.candidate
        teacher = self.study.teacher(arm.source)
        return None if teacher is None else interval_of(arm.test, teacher.test, self.metric)

    @property
    def holds_on_test(self) -> bool | None:
        """Returns whether what was asked of the metric holds on test; None if nothing was."""
        limits, sign = self.constraints, 1 if self.metric.higher_is_better else -1
        holds = []
        if limits.min_accuracy is not None:
            mean = shown_mean(self.answer.candidate.test, self.metric)
            holds.append(sign * mean >= sign * limits.min_accuracy)
        if limits.max_drop is not None and self.drop_on_test is not None:
            holds.append(sign * self.drop_on_test.mean >= -limits.max_drop)
        return all(holds) if holds else None

    @property
    def unjudged(self) -> list[Fit]:
        """Arms that nothing rules out, but that can't be judged."""
        return [f for f in self.fits if f.named("?") and not f.named("no")]

    @property
    def unjudged_names(self) -> list[str]:
        """Constraints that these can't be judged by."""
        return sorted({name for f in self.unjudged for name in f.named("?")})

    @property
    def unjudged_best(self) -> Candidate:
        """The best of these on validation."""
        return best([f.candidate for f in self.unjudged])

    @functools.cached_property
    def closest(self) -> Fit | None:
        """The arm that misses least."""
        return closest(self.fits)

    @property
    def closest_misses(self) -> list[str]:
        """How to relax what it misses."""
        return [relax(c, self.metric) for c in self.closest.checks if c.state == "no"]

    @property
    def compiled_within(self) -> str:
        """Arms whose seconds of training contain compiling."""
        ranked = (f.candidate for group in self.groups for f in group)
        mixed = [candidate.arm for candidate in ranked if candidate.compiling_is_within]
        every = len(mixed) == len(self.satisfying)
        return ("all that trained" if every else ", ".join(mixed)) if mixed else ""

    # What the rules say.

    @functools.cached_property
    def widths(self) -> list[Width]:
        """Of each experiment, network and width the simplest of the best arms."""
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

    @property
    def gaps(self) -> Sequence[gaps.Gap]:
        """What is missing in the study."""
        return gaps.find_gaps(self.study, self.fits, self.findings, self.constraints)
