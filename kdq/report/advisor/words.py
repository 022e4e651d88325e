"""Measured numbers as the advisor words them."""

import math
from collections.abc import Mapping

from kdq.evaluate.statistics import PairedInterval, summary
from kdq.report.advisor.evidence import Candidate, Study
from kdq.report.aggregate import Mean
from kdq.report.cells import ABSENT, mean_cell


def label(candidate: Candidate, study: Study) -> str:
    """An arm, with its experiment where a study has several."""
    return candidate.arm if len(study.sources) == 1 else f"{candidate.source.name}: {candidate.arm}"


def width(bits: str) -> str:
    """Where a comparison was made: at W4A4, in float."""
    return "in float" if bits == "fp32" else f"at {bits}"


def by_seed(values: Mapping[int, float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds, of percents."""
    mean, std = summary(values.values())
    return mean_cell(Mean(mean=mean, std=std, n=len(values)), digits)


def percent(values: Mapping[int, float]) -> str:
    """The same within a sentence."""
    if len(values) == 1:
        return f"{next(iter(values.values())):.2f}% (one seed)"
    return f"{by_seed(values)}%"


def interval(found: PairedInterval | None) -> str:
    """A difference in points, with its 95% interval if there are seeds enough for one."""
    if found is None:
        return ABSENT
    if math.isnan(found.low):
        return f"{found.mean:+.2f} (one seed)"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def seconds(candidate: Candidate) -> str:
    """Of training; "≈" where what an arm starts from had to be inferred."""
    return f"{'' if candidate.lineage.known else '≈ '}{candidate.seconds:.1f}"


def compiling_is_within(candidate: Candidate) -> bool:
    """Returns whether the seconds of an arm's training contain those of compiling."""
    return candidate.seconds > 0 and math.isnan(candidate.compile_seconds)


def plain(value: float, form: str) -> str:
    """A number; "—" of nan."""
    return ABSENT if math.isnan(value) else format(value, form)
