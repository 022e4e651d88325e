"""What the records of a study do not say, and what to run to know it."""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Sequence

from kdq.report.advisor.compare import Finding
from kdq.report.advisor.constraints import Constraints, Fit
from kdq.report.advisor.document import Document, ranges
from kdq.report.advisor.evidence import Candidate, Source, Study
from kdq.report.advisor.rules import LEVEL, METHODS, REQUIREMENTS, SEEDS
from kdq.report.advisor.words import compiling_is_within, width

MOST_SEEDS = 30  # more than that is no advice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """One thing that is missing."""

    text: str
    command: str  # what to type; "" where there is nothing to
    cited: tuple[Candidate, ...] = ()


def write(
    document: Document,
    study: Study,
    fits: Sequence[Fit],
    findings: dict[Source, list[Finding]],
    constraints: Constraints,
) -> None:
    """Adds what is missing in a study, each with the command that gets it."""
    document.heading("What is missing", 3)
    gaps = list(_failures(study))
    for source in study.sources:
        own = [f for f in fits if f.candidate.source is source]
        arms = [f.candidate for f in own]
        gaps += _unknown(source, own, constraints)
        gaps += _seeds(source, arms)
        gaps += _undecided(source, findings[source])
        gaps += _teacher(source, arms)
    gaps += _methods(study)
    for gap in gaps:
        document.say(gap.text, *gap.cited, kind="item")
        if gap.command:
            document.command(gap.command)
    if not gaps:
        document.say("Nothing that was asked for.")
    if any(gap.command for gap in gaps):
        document.say(
            "To the commands belong what the experiment was first run with: its config (CONFIG, "
            "where it is not known; its digest is in the table of rows), the flags, and its folder "
            "(WORKDIR), in which what is finished stays, or a new one."
        )


def _some(arms: Iterable[Candidate]) -> tuple[tuple[Candidate, ...], str]:
    """The first arms, to be cited, and a text with their names."""
    arms = list(arms)
    more = f" and {len(arms) - 3} more" if len(arms) > 3 else ""
    return tuple(arms[:3]), ", ".join(arm.arm for arm in arms[:3]) + more


def _failures(study: Study) -> Iterable[Gap]:
    for source, record in study.failures:
        reason = " ".join(str(record.get("error") or "no reason recorded").split())
        yield Gap(
            text=f"{source.name}: {record['arm']}, seed {record['seed']}, failed and is not used: "
            f"{reason}",
            command=command(source),
        )


def _unknown(source: Source, fits: Sequence[Fit], constraints: Constraints) -> Iterable[Gap]:
    for name, one in REQUIREMENTS.items():
        cited, names = _some(f.candidate for f in fits if name in f.named("?"))
        if cited:
            yield Gap(
                text=f"{source.name}: {name} can't be judged of {names}: {one.unknown}.",
                command=f"{command(source)} {one.measure.format(batch=constraints.batch)}".strip()
                if one.rerun
                else "",
                cited=cited,
            )
    mixed = [f.candidate for f in fits if compiling_is_within(f.candidate)]
    if constraints.training_minutes is not None and mixed:
        cited, names = _some(mixed)
        yield Gap(
            text=f"{source.name}: the training times of {names} contain compiling, as their "
            "records are of a version that did not tell it apart; in a new folder it is.",
            command="",
            cited=cited,
        )
    guessed = [f.candidate for f in fits if not f.candidate.lineage.known]
    if constraints.training_minutes is not None and guessed:
        cited, names = _some(guessed)
        yield Gap(
            text=f"{source.name}: what {names} start from is inferred from what they are compared "
            "with, so their training may be longer; --workdirs=FOLDER knows it.",
            command="",
            cited=cited,
        )


def _seeds(source: Source, arms: Sequence[Candidate]) -> Iterable[Gap]:
    cited, names = _some(arm for arm in arms if len(arm.seeds) < SEEDS)
    if cited:
        have = sorted({seed for arm in arms for seed in arm.seeds})
        yield Gap(
            text=f"{source.name}: fewer than {SEEDS} seeds of {names}, so no interval that a claim "
            "could rest on.",
            command=f"{command(source)} --config.seeds={_more(have, SEEDS)}",
            cited=cited,
        )


def _undecided(source: Source, findings: Sequence[Finding]) -> Iterable[Gap]:
    """Comparisons with seeds enough for an interval that is too wide to say anything."""
    own = [f for f in findings if f.verdict == "undecided" and f.difference.n >= SEEDS]
    if not own:
        return
    needed = {f: _needed(f) for f in own}
    have = sorted({seed for f in own for seed in f.a.seeds})
    names = "; ".join(
        f"{f.rule.name} {width(f.a.bits)} "
        f"({f'about {n} seeds' if n <= MOST_SEEDS else f'more than {MOST_SEEDS} seeds'})"
        for f, n in needed.items()
    )
    few = max((n for n in needed.values() if n <= MOST_SEEDS), default=0)
    yield Gap(
        text=f"{source.name}: not decided by seeds {ranges(have)}, but by as many as in "
        f"parentheses if means and spreads stay as they are: {names}.",
        command=f"{command(source)} --config.seeds={_more(have, few)}" if few else "",
        cited=tuple(c for f in own for c in (f.a, f.b)),
    )


def _needed(finding: Finding) -> int:
    """Seeds at which the interval would exclude 0 or be level, if its width falls as 1/√n."""
    found = finding.difference
    half = (found.high - found.low) / 2
    target = max(abs(found.mean), LEVEL - abs(found.mean))
    return max(math.ceil(found.n * (half / target) ** 2), found.n + 1)


def _teacher(source: Source, arms: Sequence[Candidate]) -> Iterable[Gap]:
    teachers = [arm for arm in arms if arm.kind == "teacher"]
    for teacher in teachers:
        if not any(arm.params == teacher.params and arm.widths for arm in arms):
            yield Gap(
                text=f"{source.name}: {teacher.arm} itself was never quantized, so whether a "
                "smaller network is needed at all is not known. Add to config.arms, and run:",
                command=_calibrate(source, teacher.arm),
                cited=(teacher,),
            )


def _calibrate(source: Source, arm: str) -> str:
    model = source.config["arms"][arm]["model"] if source.config else arm
    code = f'{arm + "_w8a8"!r}: arm(model={model!r}, init={arm!r}, bits="W8A8", reference={arm!r})'
    return f"{code}\n{command(source)}"


def _methods(study: Study) -> Iterable[Gap]:
    there = {candidate.method for candidate in study.candidates}
    for method in METHODS.values():
        if method.name not in there:
            yield Gap(
                text=f"{method.name}: no arm does it ({method.says}). {method.how}",
                command=method.arm,
            )


def _more(have: Sequence[int], least: int) -> str:
    """The seeds that there are and as many further ones as are missing, for a flag."""
    new = (seed for seed in range(len(have) + least) if seed not in have)
    missing = [next(new) for _ in range(least - len(have))]
    return ",".join(map(str, sorted([*have, *missing])))


def command(source: Source) -> str:
    """What runs an experiment again, as far as is known where its records came from."""
    config = source.config_file or "CONFIG"
    workdir = source.path if source.config else "WORKDIR"
    line = f"python launch/compress.py --config={shlex.quote(config)}"
    line += f" --workdir={shlex.quote(workdir)}"
    data_dir = source.config and source.config["data"].get("data_dir")
    return line + (f" --config.data.data_dir={shlex.quote(data_dir)}" if data_dir else "")
