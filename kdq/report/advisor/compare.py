"""Applies the rules of `kdq.report.advisor.rules` to measured arms."""

import dataclasses
from collections.abc import Sequence

from kdq.evaluate.statistics import PairedInterval
from kdq.report.advisor.constraints import difference, mean
from kdq.report.advisor.evidence import Candidate, Source, Study
from kdq.report.advisor.rules import LEVEL, RULES, SEEDS, Rule

NEAR = 0.1  # files of which neither is larger than the other by more than this share


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """A rule, two arms that it compares, and their difference on test, in points."""

    rule: Rule
    a: Candidate
    b: Candidate
    difference: PairedInterval

    @property
    def verdict(self) -> str:
        """A template of the rule ("above", "below", "level"), or "undecided"."""
        if self.difference.n < SEEDS:
            return "undecided"
        if self.difference.excludes_zero:
            return "above" if self.difference.mean > 0 else "below"
        return "level" if max(self.difference.high, -self.difference.low) <= LEVEL else "undecided"


def findings(study: Study, source: Source) -> list[Finding]:
    """Every rule, applied to the arms of one experiment, width by width."""
    own = [c for c in study.candidates if c.source is source and not c.lineage.control]
    found = []
    for rule in RULES:
        of_a = [c for c in own if c.method == rule.a]
        for key in dict.fromkeys((c.params, c.bits) for c in of_a):
            a = best([c for c in of_a if (c.params, c.bits) == key])
            b = _other(rule, a, own, study)
            delta = None if a is None or b is None else difference(a.test, b.test)
            if delta is not None:
                found.append(Finding(rule=rule, a=a, b=b, difference=delta))
    return found


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The most accurate on validation; between equals the lower negative log-likelihood there."""
    return min(candidates, key=by_validation, default=None)


def by_validation(candidate: Candidate) -> tuple[float, float]:
    """Sorts the best first."""
    return -mean(candidate.validation), candidate.validation_nll


def _other(rule: Rule, a: Candidate, own: Sequence[Candidate], study: Study) -> Candidate | None:
    if rule.b == "teacher":
        teacher = study.teacher(a.source)
        return teacher if teacher is not None and teacher.params != a.params else None
    if rule.b == "start":
        return study.find(a.source, a.lineage.start)
    same = [c for c in own if c.params == a.params and c is not a]
    if rule.b == "uniform":
        uniform = [c for c in same if c.widths and c.method != "mixed precision"]
        trained = [c for c in uniform if (c.kind == "PTQ") == (a.kind == "PTQ")]
        return best([c for c in trained if _near(c.size_bytes, a.size_bytes)])
    equal = [c for c in same if c.bits == a.bits and c.kind != "teacher"]
    return best([c for c in equal if c.method == rule.b])


def _near(a: float, b: float) -> bool:
    return max(a, b) <= (1 + NEAR) * min(a, b)
