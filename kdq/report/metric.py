"""The tasks of records, the metrics that tables show, and how these are worded.

`Metric` alone knows units, and a task alone which metrics there are.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kdq import tasks
from kdq.fields import ConfigError
from kdq.record import ArmRecord
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks import Task


def _extra(name: str, heading: str, unit: str = "%", decimals: int = 2) -> tuple[Metric, str]:
    return Metric(name=name, scores=(), unit=unit, decimals=decimals), heading


# Measured by some experiments only: name of the field -> (metric, heading of its column).
TRANSFER = {
    metric.name: (metric, heading)
    for metric, heading in (
        _extra("ece", "ECE %"),
        _extra("agreement_where_teacher_wrong", "Agreement where teacher is wrong %", decimals=1),
        _extra("attribution_cosine", "Attribution cosine", "", 3),
        _extra("attribution_rank", "Attribution rank", "", 3),
        _extra("path_agreement", "Agreement on paths %", decimals=1),
        _extra("adversarial_agreement", "Agreement after adversarial step %", decimals=1),
        _extra("accuracy_corrected", "Accuracy with bias corrected %"),
    )
}
ACRONYMS = ("rmse", "mae", "r2", "f1", "nll", "kl", "ece")
# Metrics of tasks that no table has a column of.
NOT_SHOWN = ("nll", "noise")
# Heads of columns that say less than the metric's name.
SHORT = {"kl_to_teacher": "KL"}
# Definitions, for the notes below tables: of a metric's name, else of a task's and the name.
DEFINITIONS = {
    "agreement": "share of test predictions in which arm and teacher predict the same",
    "classification agreement": "share of test examples on which arm and teacher predict the same "
    "class",
    "kl_to_teacher": "KL(teacher ‖ arm), nats",
    "rmse_to_teacher": "root of the mean squared difference of the outputs from the teacher's",
    "r2": "the share of the targets' variance that predictions explain",
    "macro_f1": "the mean over labels of each one's F1; micro F1 is of all labels together",
    "mean_average_precision": "the mean over labels of the average precision, which no threshold "
    "enters",
}


def task_of_records(records: Iterable[ArmRecord]) -> "Task":
    """Returns the task of records, which says what their metrics are.

    Raises ConfigError for records of several tasks, which no table compares, and for a task that
    this version does not know.
    """
    kinds = list(dict.fromkeys(map(task_key, records)))
    if len(kinds) != 1:
        names = ", ".join(" in ".join(filter(None, kind)) for kind in kinds)
        raise ConfigError(f"report: expected records of one task, got {names or 'no record'}")
    return _build_task(*kinds[0])


def task_key(record: ArmRecord) -> tuple[str, str]:
    """Returns the name of a record's task and the unit of its targets: equal for one table."""
    return record.task, record.unit


@functools.cache
def _build_task(name: str, unit: str) -> "Task":
    return tasks.build(name, **({"unit": unit} if unit else {}))


def metric_of_records(records: Iterable[ArmRecord]) -> Metric:
    """Returns the metric that ranks the arms of records."""
    return task_of_records(records).primary


def other_metrics(task: "Task") -> list[Metric]:
    """Returns the metrics that stand beside the one that arms are ranked by."""
    return [metric for metric in task.metrics[1:] if metric.name not in NOT_SHOWN]


def fidelity_metrics(task: "Task") -> list[Metric]:
    """Returns how far an arm is from its teacher, as tables show it."""
    return [metric for metric in task.fidelity if metric.name not in NOT_SHOWN]


def distance_metric(task: "Task") -> Metric:
    """Returns what sensitivities of layers are measured by: KL in nats, or RMSE."""
    return next(metric for metric in task.fidelity if not metric.higher_is_better)


def definition(task: "Task", metric: Metric) -> str:
    """Returns the sentence that defines a metric, if it says more than the name; or ""."""
    text = DEFINITIONS.get(f"{task.name} {metric.name}") or DEFINITIONS.get(metric.name)
    return f"{SHORT.get(metric.name) or named(metric, first=True)}: {text}." if text else ""


def title(metric: Metric) -> str:
    """Returns a metric as the head of a column: "Accuracy %", "RMSE mg/dl"."""
    return SHORT.get(metric.name) or f"{named(metric, first=True)} {metric.unit}".rstrip()


def named(metric: Metric, *, first: bool = False) -> str:
    """Returns the name as a word of a sentence, or the `first` word of one."""
    words = [word.upper() if word in ACRONYMS else word for word in metric.name.split("_")]
    name = " ".join(words)
    return name[:1].upper() + name[1:] if first else name


def in_unit(metric: Metric) -> str:
    """Returns the unit after a comma: ", percent", ", mg/dl"; "" of none."""
    return {"%": ", percent", "": ""}.get(metric.unit, f", {metric.unit}")


def axis(metric: Metric, split: str) -> str:
    """Returns the title of an axis: "test accuracy, %", "test RMSE, mg/dl, lower is better"."""
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{split} {named(metric)}{unit}{'' if metric.higher_is_better else ', lower is better'}"


def likeness(metric: Metric) -> str:
    """Returns the title of an axis of a fidelity metric: "agreement with the teacher, %"."""
    name = "agreement with the teacher" if metric.name == "agreement" else named(metric)
    return name + (f", {metric.unit}" if metric.unit else "")


def units_phrase(metric: Metric) -> str:
    """Returns what differences are in: "accuracy points", "percent of RMSE", "MAE (mg/dl)"."""
    if metric.relative:
        return f"percent of {named(metric)}"
    if metric.unit == "%":
        return f"{named(metric)} points"
    return f"{named(metric)} ({metric.unit})" if metric.unit else named(metric)


def words(metric: Metric) -> dict[str, str]:
    """Returns what stands for a metric in the sentences of `kdq/report/advisor/rules.toml`."""
    quality = named(metric) if metric.higher_is_better else "quality"
    return {
        "metric": named(metric),
        "quality": quality,
        "Quality": quality[:1].upper() + quality[1:],
        "bad": "low" if metric.higher_is_better else "high",
    }
