"""Gaps in the records of a study, and what to run to close them."""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence

from kdq.record import ArmRecord
from kdq.report.advisor import words
from kdq.report.advisor.compare import Finding
from kdq.report.advisor.constraints import Constraints, Fit
from kdq.report.advisor.rules import METHODS, REQUIREMENTS, SEEDS, Method, Requirement
from kdq.report.advisor.study import Candidate, Study
from kdq.report.workdirs import Workdir

MOST_SEEDS = 30  # more than that is no advice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """One thing that is missing; which fields it has depends on its kind."""

    kind: str
    source: Workdir | None = None
    arms: tuple[Candidate, ...] = ()  # that it is about
    commands: tuple[str, ...] = ()  # lines to type
    record: ArmRecord | None = None  # of "failed"
    requirement: Requirement | None = None  # of "unknown"
    # Of "undecided": seeds that would decide.
    needed: tuple[tuple[Finding, float], ...] = ()
    method: Method | None = None  # of "method"
    reasons: tuple[str, ...] = ()  # of "scores"

    @property
    def names(self) -> str:
        """A few of the arms."""
        return words.name_a_few([arm.arm for arm in self.arms])

    @property
    def cited(self) -> list[Candidate]:
        """Arms whose numbers are used."""
        if self.needed:
            return [arm for finding, _ in self.needed for arm in (finding.a, finding.b)]
        return list(self.arms[:3])

    @property
    def seeds(self) -> str:
        """Seeds of the arms that are compared."""
        return words.ranges({seed for finding, _ in self.needed for seed in finding.a.seeds})


def find_gaps(
    study: Study,
    fits: Sequence[Fit],
    findings: Mapping[Workdir, Sequence[Finding]],
    constraints: Constraints,
) -> list[Gap]:
    """Returns what is missing in a study."""
    gaps = [
        Gap(kind="failed", source=source, record=record, commands=(command(source),))
        for source, record in study.failures
    ]
    for source in study.sources:
        mine = [f for f in fits if f.candidate.source is source]
        arms = [f.candidate for f in mine]
        if reasons := tuple(run.lost for run in source.runs if run.lost):
            gaps.append(Gap(kind="scores", source=source, reasons=reasons))
        gaps += _unknown(source, mine, constraints)
        gaps += _too_few_seeds(source, arms)
        gaps += _undecided(source, findings[source])
        gaps += _unquantized_teachers(source, arms)
    there = {candidate.method for candidate in study.candidates}
    gaps += [
        Gap(kind="method", method=method, commands=(method.arm,))
        for method in METHODS.values()
        if method.name not in there
    ]
    return gaps


def _unknown(source: Workdir, fits: Sequence[Fit], constraints: Constraints) -> Iterable[Gap]:
    for name, requirement in REQUIREMENTS.items():
        if arms := tuple(f.candidate for f in fits if name in f.named("?")):
            flags = requirement.measure.format(batch=constraints.batch)
            commands = (f"{command(source)} {flags}".strip(),) if requirement.rerun else ()
            yield Gap(
                kind="unknown",
                source=source,
                arms=arms,
                commands=commands,
                requirement=requirement,
            )
    if constraints.training_minutes is not None:
        arms = [f.candidate for f in fits]
        if mixed := tuple(arm for arm in arms if arm.compiling_is_within):
            yield Gap(kind="compiling", source=source, arms=mixed)
        if inferred := tuple(arm for arm in arms if not arm.lineage.known):
            yield Gap(kind="inferred", source=source, arms=inferred)


def _too_few_seeds(source: Workdir, arms: Sequence[Candidate]) -> Iterable[Gap]:
    if few := tuple(arm for arm in arms if len(arm.seeds) < SEEDS):
        have = sorted({seed for arm in arms for seed in arm.seeds})
        line = f"{command(source)} --config.seeds={_add_seeds(have, SEEDS)}"
        yield Gap(kind="seeds", source=source, arms=few, commands=(line,))


def _undecided(source: Workdir, findings: Sequence[Finding]) -> Iterable[Gap]:
    """Yields comparisons with seeds enough for an interval, which is too wide to say anything."""
    needed = tuple((f, _count_needed(f)) for f in findings if f.verdict == "undecided")
    if needed:
        have = sorted({seed for finding, _ in needed for seed in finding.a.seeds})
        few = max((n for _, n in needed if n <= MOST_SEEDS), default=0)
        line = f"{command(source)} --config.seeds={_add_seeds(have, few)}"
        yield Gap(kind="undecided", source=source, needed=needed, commands=(line,) if few else ())


def _count_needed(finding: Finding) -> float:
    """Returns seeds at which the interval would exclude 0 or be level; inf if none would do.

    Over seeds it narrows as 1/√n; what test examples add to its square does not.
    """
    interval, over_seeds = finding.difference, finding.over_seeds
    half, half_of_seeds = ((each.high - each.low) / 2 for each in (interval, over_seeds))
    target = max(abs(interval.mean), finding.a.metric.level - abs(interval.mean))
    room = target**2 - max(half**2 - half_of_seeds**2, 0.0)
    if room <= 0:
        return math.inf
    return max(math.ceil(interval.n * half_of_seeds**2 / room), interval.n + 1)


def _unquantized_teachers(source: Workdir, arms: Sequence[Candidate]) -> Iterable[Gap]:
    for teacher in (arm for arm in arms if arm.kind == "teacher"):
        if not any(arm.params == teacher.params and arm.widths for arm in arms):
            name = teacher.arm
            model = source.config["arms"][name]["model"] if source.config else name
            arguments = f'model={model!r}, init={name!r}, bits="W8A8", reference={name!r}'
            code = f"{name + '_w8a8'!r}: arm({arguments})"
            yield Gap(
                kind="teacher", source=source, arms=(teacher,), commands=(code, command(source))
            )


def _add_seeds(have: Sequence[int], least: int) -> str:
    """Returns the seeds that there are and as many new ones as are missing, for a flag."""
    new = (seed for seed in range(len(have) + least) if seed not in have)
    missing = [next(new) for _ in range(least - len(have))]
    return ",".join(map(str, sorted([*have, *missing])))


def command(source: Workdir) -> str:
    """Returns what runs an experiment again, as far as is known where its records came from."""
    config = source.config_file or "CONFIG"
    workdir = source.path if source.config else "WORKDIR"
    line = f"python launch/compress.py --config={shlex.quote(config)}"
    line += f" --workdir={shlex.quote(workdir)}"
    data_dir = source.config and source.config["data"].get("data_dir")
    return line + (f" --config.data.data_dir={shlex.quote(data_dir)}" if data_dir else "")
