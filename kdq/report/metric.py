"""The metrics that tables show, and how their values are worded. `Metric` alone knows units."""

from collections.abc import Iterable

from kdq.record import ArmRecord
from kdq.tasks.classification import ACCURACY
from kdq.tasks.metric import Metric

# Measured by some experiments only: name of the field -> (metric, heading of its column).
TRANSFER = {
    metric.name: (metric, heading)
    for metric, heading in (
        (Metric(name="ece", scores=(), unit="%"), "ECE %"),
        (
            Metric(name="agreement_where_teacher_wrong", scores=(), unit="%", decimals=1),
            "Agreement where teacher is wrong %",
        ),
        (Metric(name="attribution_cosine", scores=(), decimals=3), "Attribution cosine"),
        (Metric(name="attribution_rank", scores=(), decimals=3), "Attribution rank"),
        (Metric(name="path_agreement", scores=(), unit="%", decimals=1), "Agreement on paths %"),
        (
            Metric(name="adversarial_agreement", scores=(), unit="%", decimals=1),
            "Agreement after adversarial step %",
        ),
        (Metric(name="accuracy_corrected", scores=(), unit="%"), "Accuracy with bias corrected %"),
    )
}
ACRONYMS = ("rmse", "mae", "r2", "nll", "kl", "ece")


def metric_of_records(records: Iterable[ArmRecord]) -> Metric:
    """Returns the metric that ranks the arms of records, all of which are classifiers'."""
    return ACCURACY


def title(metric: Metric) -> str:
    """Returns a metric as the head of a column: "Accuracy %", "RMSE mg/dl"."""
    return f"{named(metric, first=True)} {metric.unit}".rstrip()


def named(metric: Metric, *, first: bool = False) -> str:
    """Returns the name as a word of a sentence, or the `first` word of one."""
    name = metric.name.replace("_", " ")
    if name in ACRONYMS:
        return name.upper()
    return name[:1].upper() + name[1:] if first else name


def axis(metric: Metric, split: str) -> str:
    """Returns the title of an axis: "test accuracy, %"."""
    return f"{split} {named(metric)}" + (f", {metric.unit}" if metric.unit else "")


def units_phrase(metric: Metric) -> str:
    """Returns what differences are in: "accuracy points", "percent of RMSE", "MAE (mg/dl)"."""
    if metric.relative:
        return f"percent of {named(metric)}"
    if metric.unit == "%":
        return f"{named(metric)} points"
    return f"{named(metric)} ({metric.unit})" if metric.unit else named(metric)


def words(metric: Metric) -> dict[str, str]:
    """Returns what stands for a metric in the sentences of `kdq.report.advisor.rules`."""
    quality = named(metric) if metric.higher_is_better else "quality"
    return {
        "metric": named(metric),
        "quality": quality,
        "Quality": quality[:1].upper() + quality[1:],
        "bad": "low" if metric.higher_is_better else "high",
    }
