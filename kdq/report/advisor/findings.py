"""Findings: the advisor's rules applied to measured arms; and gaps: what is missing."""

import dataclasses
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kdq.evaluate.statistics import PairedInterval
from kdq.report.advisor.constraints import Constraints, Fit, best, gain_of
from kdq.report.advisor.rules import METHODS, REQUIREMENTS, RULES, SEEDS, Rule
from kdq.report.advisor.study import Candidate, Study
from kdq.report.aggregate import compare_on_test
from kdq.report.cells import name_a_few
from kdq.report.workdirs import Workdir

NEAR = 0.1  # files of which neither is larger than the other by more than this share
MOST_SEEDS = 30  # more than that is no advice


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

    @property
    def seeds_needed(self) -> float:
        """Seeds at which the interval would exclude 0 or be level; inf if no number would do.

        Over seeds it narrows as 1/√n; what test examples add to its square does not.
        """
        interval, over_seeds = self.difference, self.over_seeds
        half, half_of_seeds = ((each.high - each.low) / 2 for each in (interval, over_seeds))
        target = max(abs(interval.mean), self.a.metric.level - abs(interval.mean))
        room = target**2 - max(half**2 - half_of_seeds**2, 0.0)
        if room <= 0:
            return math.inf
        return max(math.ceil(interval.n * half_of_seeds**2 / room), interval.n + 1)


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
        sizes = lambda c: (c.size_bytes, a.size_bytes)
        return best([c for c in trained if max(sizes(c)) <= (1 + NEAR) * min(sizes(c))])
    equal = [c for c in same if c.bits == a.bits and c.kind != "teacher"]
    return best([c for c in equal if c.method == rule.b])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """One thing that is missing in the records of a study, and what to run to close it."""

    kind: str  # which the template has words for
    source: Workdir | None = None
    arms: tuple[Candidate, ...] = ()
    # The record, requirement, method, findings or reasons that it is about, by the kind.
    about: Any = None
    commands: tuple[str, ...] = ()  # lines to type

    @property
    def names(self) -> str:
        """A few of the arms."""
        return name_a_few([arm.arm for arm in self.arms])


def find_gaps(
    study: Study,
    fits: Sequence[Fit],
    every: Mapping[Workdir, Sequence[Finding]],
    constraints: Constraints,
) -> list[Gap]:
    """Returns what is missing in a study with these fits, and findings by experiment."""
    gaps = [
        Gap(kind="failed", source=source, about=record, commands=(_command(source),))
        for source, record in study.failures
    ]
    for source in study.sources:
        mine = [f for f in fits if f.candidate.source is source]
        gaps += _gaps_of_source(source, mine, every[source], constraints)
    there = {candidate.method for candidate in study.candidates}
    return gaps + [
        Gap(kind="method", about=method, commands=(method.arm,))
        for method in METHODS.values()
        if method.name not in there
    ]


def _gaps_of_source(
    source: Workdir, fits: Sequence[Fit], findings: Sequence[Finding], constraints: Constraints
) -> Iterator[Gap]:
    arms, run = [f.candidate for f in fits], _command(source)
    if reasons := [run.lost for run in source.runs if run.lost]:
        yield Gap(kind="scores", source=source, about=reasons)
    for name, requirement in REQUIREMENTS.items():
        if unknown := tuple(f.candidate for f in fits if name in f.named("?")):
            flags = requirement.measure.format(batch=constraints.batch)
            commands = (f"{run} {flags}".strip(),) if requirement.rerun else ()
            yield Gap(
                kind="unknown", source=source, arms=unknown, about=requirement, commands=commands
            )
    if constraints.training_minutes is not None:
        if mixed := tuple(arm for arm in arms if arm.compiling_is_within):
            yield Gap(kind="compiling", source=source, arms=mixed)
        if inferred := tuple(arm for arm in arms if not arm.lineage.known):
            yield Gap(kind="inferred", source=source, arms=inferred)
    if few := tuple(arm for arm in arms if len(arm.seeds) < SEEDS):
        line = f"{run} --config.seeds={_add_seeds(arms, SEEDS)}"
        yield Gap(kind="seeds", source=source, arms=few, commands=(line,))
    # Comparisons with seeds enough for an interval, which is too wide to say anything.
    if undecided := [f for f in findings if f.verdict == "undecided"]:
        pairs, compared = [arm for f in undecided for arm in (f.a, f.b)], [f.a for f in undecided]
        enough = max((f.seeds_needed for f in undecided if f.seeds_needed <= MOST_SEEDS), default=0)
        line = f"{run} --config.seeds={_add_seeds(compared, enough)}"
        commands = (line,) if enough else ()
        yield Gap(
            kind="undecided", source=source, arms=tuple(pairs), about=undecided, commands=commands
        )
    for teacher in (arm for arm in arms if arm.kind == "teacher"):
        if not any(arm.params == teacher.params and arm.widths for arm in arms):
            name = teacher.arm
            model = source.config["arms"][name]["model"] if source.config else name
            arguments = f'model={model!r}, init={name!r}, bits="W8A8", reference={name!r}'
            code = f"{name + '_w8a8'!r}: arm({arguments})"
            yield Gap(kind="teacher", source=source, arms=(teacher,), commands=(code, run))


def _add_seeds(arms: Sequence[Candidate], least: int) -> str:
    """Returns the seeds that arms have and as many new ones as are missing, for a flag."""
    have = {seed for arm in arms for seed in arm.seeds}
    new = (seed for seed in range(len(have) + least) if seed not in have)
    missing = [next(new) for _ in range(least - len(have))]
    return ",".join(map(str, sorted([*have, *missing])))


def _command(source: Workdir) -> str:
    """Returns what runs an experiment again, as far as is known where its records came from."""
    config = source.config_file or "CONFIG"
    workdir = source.path if source.config else "WORKDIR"
    line = f"python launch/compress.py --config={shlex.quote(config)}"
    line += f" --workdir={shlex.quote(workdir)}"
    data_dir = source.config and source.config["data"].get("data_dir")
    return line + (f" --config.data.data_dir={shlex.quote(data_dir)}" if data_dir else "")
