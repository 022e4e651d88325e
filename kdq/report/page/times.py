"""Latencies of exported files, which are of one device and one batch size each."""

from collections.abc import Sequence

from kdq.evaluate.statistics import summary
from kdq.report import Record
from kdq.report.aggregate import Mean

Condition = tuple[str, int]  # device, batch size


def latencies(records: Sequence[Record]) -> dict[Condition, dict[str, tuple[Mean, str]]]:
    """{(device, batch): {arm: (milliseconds over seeds, the fastest format)}}."""
    found: dict[Condition, dict[str, dict[str, list[float]]]] = {}
    for record in records:
        for form, entry in (record.get("exports") or {}).items():
            times = entry.get("latency") or {} if isinstance(entry, dict) else {}
            device = (times.get("conditions") or {}).get("device", "a device that is not recorded")
            for batch, one in times.items():
                if batch.isdigit() and isinstance(one, dict) and "milliseconds" in one:
                    arms = found.setdefault((device, int(batch)), {})
                    own = arms.setdefault(record["arm"], {}).setdefault(form, [])
                    own.append(float(one["milliseconds"]))
    return {
        condition: {arm: _fastest(forms) for arm, forms in arms.items()}
        for condition, arms in sorted(found.items())
    }


def _fastest(forms: dict[str, list[float]]) -> tuple[Mean, str]:
    means = {form: summary(values) for form, values in forms.items()}
    form = min(means, key=lambda name: means[name][0])
    mean, std = means[form]
    return Mean(mean=mean, std=std, n=len(forms[form])), form
