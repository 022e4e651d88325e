"""Measured numbers as the advisor words them."""

import math
from collections.abc import Iterable, Sequence

from kdq.evaluate.statistics import PairedInterval
from kdq.report.advisor.constraints import PACKED, Check, Fit
from kdq.report.advisor.rules import REQUIREMENTS
from kdq.report.advisor.study import Candidate, Values
from kdq.report.aggregate import Mean
from kdq.report.cells import ABSENT, format_bytes, mean_cell, number_cell
from kdq.tasks.metric import Metric


def name_width(bits: str) -> str:
    """Returns where a comparison was made: "at W4A4", "in float"."""
    return "in float" if bits == "fp32" else f"at {bits}"


def by_seed(values: Values, metric: Metric) -> str:
    """Returns mean ± standard deviation over seeds, as the metric is shown."""
    return mean_cell(Mean.over(map(metric.shown, values.values())), metric.decimals)


def in_sentence(values: Values, metric: Metric) -> str:
    """Returns the same with its unit, within a sentence."""
    if len(values) == 1:
        return f"{metric.text(next(iter(values.values())))} (one seed)"
    return f"{by_seed(values, metric)}{metric.unit if metric.unit == '%' else f' {metric.unit}'}"


def interval(difference: PairedInterval | None, metric: Metric) -> str:
    """Returns a difference, with its 95% interval if there are seeds enough for one."""
    if difference is None:
        return ABSENT
    mean, low, high = map(
        metric.difference_number, (difference.mean, difference.low, difference.high)
    )
    ends = "" if math.isnan(difference.low) else f" [{low}, {high}]"
    return f"{mean}{ends}{' (one seed)' if difference.n == 1 else ''}"


def seconds(candidate: Candidate) -> str:
    """Returns those of training; "≈" where what an arm starts from had to be inferred."""
    return f"{'' if candidate.lineage.known else '≈ '}{candidate.seconds:.1f}"


def file(fit: Fit) -> str:
    """Returns the size of a file, and its format where that is not kdq's own."""
    form = "" if fit.file == PACKED else f" as {fit.file}"
    return format_bytes(fit.size_bytes) + form


def latency(fit: Fit, batch: int) -> str:
    """Returns the milliseconds of a batch and the format that takes them."""
    form, milliseconds = fit.fastest(batch)
    return f"{number_cell(milliseconds, '.3f')} {form}".strip()


def level(metric: Metric) -> str:
    """Returns the metric's `level` with its unit: "1 point"."""
    unit = metric.difference_unit
    singular = unit == "points" and metric.level == 1
    return f"{metric.level:g} {unit.removesuffix('s') if singular else unit}"


def relax(check: Check, metric: Metric) -> str:
    """Returns what would let an arm in that a check rules out."""
    requirement = REQUIREMENTS[check.requirement]
    if math.isnan(check.value):
        return f"{check.requirement} ({requirement.fails})"
    units = {"accuracy": metric.unit, "drop": metric.difference_unit}
    unit = units.get(check.requirement, requirement.unit)
    # Rounded to four digits, to the side on which the arm fits.
    least = check.requirement == "accuracy" and metric.higher_is_better
    digit = 10.0 ** (math.floor(math.log10(check.value)) - 3) if check.value > 0 else 1.0
    value = (math.floor if least else math.ceil)(round(check.value / digit, 6)) * digit
    return f"{check.requirement} from {check.limit:g} to {value:.4g} {unit}"


def name_a_few(names: Sequence[str], most: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def ranges(numbers: Iterable[int]) -> str:
    """Returns "0–2, 5" for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)
