"""Applies the rules of `kdq.report.advisor.rules` to measured arms."""

import dataclasses
from collections.abc import Sequence

from kdq.evaluate.statistics import PairedInterval
from kdq.report.advisor.constraints import best, gain_of
from kdq.report.advisor.rules import RULES, SEEDS, Rule
from kdq.report.advisor.study import Candidate, Study
from kdq.report.aggregate import compare_on_test
from kdq.report.workdirs import Workdir

NEAR = 0.1  # files of which neither is larger than the other by more than this share


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """A rule, two arms that it compares, and their difference on test."""

    rule: Rule
    a: Candidate
    b: Candidate
    difference: PairedInterval  # see `kdq.report.aggregate.compare_on_test`
    over_seeds: PairedInterval  # the same over seeds alone

    @property
    def verdict(self) -> str:
        """A template of the rule ("above", "below", "level"), "undecided", or "seen".

        "seen" is of too few seeds for a claim.
        """
        if self.difference.n < SEEDS:
            return "seen"
        gain = gain_of(self.difference, self.a.metric)
        if gain.excludes_zero:
            return "above" if gain.mean > 0 else "below"
        return "level" if max(gain.high, -gain.low) <= self.a.metric.level else "undecided"


def findings(study: Study, source: Workdir) -> list[Finding]:
    """Applies every rule to the arms of one experiment, width by width."""
    arms = [c for c in study.candidates if c.source is source and not c.lineage.control]
    result = []
    for rule in RULES:
        matching = [c for c in arms if c.method == rule.a]
        for key in dict.fromkeys((c.params, c.bits) for c in matching):
            a = best([c for c in matching if (c.params, c.bits) == key])
            b = _partner(rule, a, arms, study)
            delta, over_seeds = (None, None) if b is None else compare_on_test(a, b)
            if delta is not None:
                finding = Finding(rule=rule, a=a, b=b, difference=delta, over_seeds=over_seeds)
                result.append(finding)
    return result


def _partner(rule: Rule, a: Candidate, arms: Sequence[Candidate], study: Study) -> Candidate | None:
    """Returns the arm that a rule compares with, where there is one."""
    if rule.b == "teacher":
        teacher = study.teacher(a.source)
        return teacher if teacher is not None and teacher.params != a.params else None
    if rule.b == "start":
        return study.find(a.source, a.lineage.start)
    same = [c for c in arms if c.params == a.params and c is not a]
    if rule.b == "uniform":
        uniform = [c for c in same if c.widths and c.method != "mixed precision"]
        trained = [c for c in uniform if (c.kind == "PTQ") == (a.kind == "PTQ")]
        return best([c for c in trained if _is_near(c.size_bytes, a.size_bytes)])
    equal = [c for c in same if c.bits == a.bits and c.kind != "teacher"]
    return best([c for c in equal if c.method == rule.b])


def _is_near(a: float, b: float) -> bool:
    return max(a, b) <= (1 + NEAR) * min(a, b)
