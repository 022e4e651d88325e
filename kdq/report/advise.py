"""The advisor: given constraints and records, which of the methods to use, and on what evidence.

Arms are selected on validation; the test split stands beside it, for what one may expect. Findings
are data; `template/advice.txt` says them in words.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

from kdq.evaluate.statistics import PairedInterval
from kdq.report.advisor import constraints as limits
from kdq.report.advisor.constraints import Constraints, Fit, best, fit, rank
from kdq.report.advisor.document import Document
from kdq.report.advisor.findings import MOST_SEEDS, Finding, find_gaps, findings
from kdq.report.advisor.rules import METHODS, QUESTIONS, RULES, SEEDS, Rule
from kdq.report.advisor.study import Candidate, Study, studies
from kdq.report.aggregate import compare_on_test, interval_of
from kdq.report.front import pareto_front
from kdq.report.notes import coverage
from kdq.report.workdirs import Workdir

SHOWN = 12  # arms of the ranking


def advise(sources: Sequence[Workdir], constraints: Constraints) -> Document:
    """Returns the report: an answer for each group of records that may be compared.

    Raises ConfigError for a least metric beyond 100 %.

    Args:
      sources: from `kdq.report.workdirs.read_evidence`.
      constraints: what has to hold.
    """
    compared = studies(sources)
    for study in compared:
        constraints.check(study.metric)
    return Document(
        "advice.txt",
        studies=[Advice(study, constraints) for study in compared],
        constraints=constraints,
        metric=compared[0].metric,
        questions=QUESTIONS,
        seeds=SEEDS,
        most_seeds=MOST_SEEDS,
        shown=SHOWN,
        inf=math.inf,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Width:
    """Arms of one experiment, one size of network and one width of numbers."""

    chosen: Candidate
    tied: tuple[Candidate, ...]
    other: Candidate | None  # the best on validation of another method

    @property
    def few(self) -> bool:
        """Returns whether there are too few seeds for a claim."""
        return len(self.chosen.seeds) < SEEDS

    @property
    def lead(self) -> PairedInterval | None:
        """The difference of the chosen to the other on test."""
        return None if self.other is None else compare_on_test(self.chosen, self.other)[0]

    @property
    def doubtful(self) -> bool:
        """Returns whether there are seeds enough for a lead, which test does not confirm."""
        gain = limits.gain_of(self.lead, self.chosen.metric)
        confirmed = gain is not None and gain.n >= SEEDS and gain.low > 0
        return not confirmed and not self.few


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
      ruled_out: of each constraint how many arms it rules out, and the arm that misses it least.
      findings: of the rules, by experiment.
      coverage: what the intervals of these are over.
    """

    def __init__(self, study: Study, constraints: Constraints):
        self.study, self.constraints, self.metric = study, constraints, study.metric
        every = [fit(candidate, constraints, study) for candidate in study.candidates]
        self.fits = [f for f in every if not f.candidate.lineage.control]
        self.controls = [f.candidate for f in every if f.candidate.lineage.control]
        self.groups = rank([f for f in self.fits if f.satisfies])
        self.satisfying = [f for group in self.groups for f in group]
        self.answer = self.satisfying[0] if self.groups else None
        if self.answer:
            self._judge_answer(self.answer.candidate)
        self.unjudged = [f for f in self.fits if f.named("?") and not f.named("no")]
        self.closest = limits.closest(self.fits)
        self.ruled_out = limits.nearest(self.fits)
        self.findings = {source: findings(study, source) for source in study.sources}
        self.coverage = coverage(f for each in self.findings.values() for f in each)
        self.gaps = find_gaps(study, self.fits, self.findings, constraints)

    def _judge_answer(self, arm: Candidate) -> None:
        self.method = METHODS[arm.method]
        self.tied = [f.candidate for f in self.groups[0][1:]]
        self.drop_on_test = self.study.drop_on_test(arm)
        asked, sign = self.constraints, 1 if self.metric.higher_is_better else -1
        holds = []
        if asked.min_accuracy is not None:
            holds.append(sign * arm.score.mean >= sign * asked.min_accuracy)
        if asked.max_drop is not None and self.drop_on_test is not None:
            holds.append(sign * self.drop_on_test.mean >= -asked.max_drop)
        self.holds_on_test = all(holds) if holds else None

    def against_answer(self, other: Fit) -> PairedInterval | None:
        """Returns the metric on validation less that of the answer, if it is another arm."""
        if self.answer is None or other is self.answer:
            return None
        mine, answers = other.candidate.validation, self.answer.candidate.validation
        return interval_of(mine, answers, self.metric)

    def best_on_validation(self, fits: Sequence[Fit]) -> Fit | None:
        """Returns the best of these, of those that satisfy if any does; None of none."""
        good = [f for f in fits if f.satisfies] or fits
        if self.answer in good:
            return self.answer
        chosen = best([f.candidate for f in good])
        return next((f for f in good if f.candidate is chosen), None)

    @property
    def by_method(self) -> dict[str, Fit | None]:
        """The best of each method."""
        return {
            method: self.best_on_validation([f for f in self.fits if f.candidate.method == method])
            for method in METHODS
        }

    @property
    def ranked(self) -> list[tuple[int, Fit]]:
        """Arms that satisfy, with their rank, which those of a group share."""
        return [(place, f) for place, group in enumerate(self.groups, 1) for f in group]

    @property
    def trade_off(self) -> list[tuple[Fit, list[str]]]:
        """Arms that are the best on validation at a size, a latency or an energy: at which."""
        fits, batch = self.satisfying, self.constraints.batch
        costs = {
            "size": [f.size_bytes for f in fits],
            "latency": [f.fastest(batch)[1] for f in fits],
            "energy": [f.candidate.energy_modelled_nj for f in fits],
        }
        best_for: dict[int, list[str]] = {}
        for name, values in costs.items():
            measured = [i for i, value in enumerate(values) if not math.isnan(value)]
            points = [(values[i], limits.merit(fits[i].candidate)) for i in measured]
            for i in pareto_front(points):
                best_for.setdefault(measured[i], []).append(name)
        order = sorted(best_for, key=lambda i: (fits[i].size_bytes, i))
        return [(fits[i], best_for[i]) for i in order]

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
            other = best([arm for arm in arms if arm.method != first.method])
            widths.append(Width(chosen=first, tied=tuple(tied), other=other))
        return widths

    @property
    def in_short(self) -> list[list[Width]]:
        """The widths at which several methods were tried, by experiment and network."""
        groups: dict[tuple[Workdir, int], list[Width]] = {}
        for width in self.widths:
            if width.other is not None:
                key = width.chosen.source, width.chosen.params
                groups.setdefault(key, []).append(width)
        return list(groups.values())

    def statements(self, question: str) -> Iterator[tuple[Workdir, Rule, str, list[Finding], bool]]:
        """Yields the rules of a question with those findings in an experiment that agree.

        With their verdict, and whether the rule has findings on networks of several sizes.
        """
        for source, every in self.findings.items():
            for rule in (rule for rule in RULES if rule.question == question):
                matching = [f for f in every if f.rule is rule]
                several = len({f.a.params for f in matching}) > 1
                for verdict in ("above", "level", "below", "undecided", "seen"):
                    if agreeing := [f for f in matching if f.verdict == verdict]:
                        yield source, rule, verdict, agreeing, several
