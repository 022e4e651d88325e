"""Knowledge distillation and quantization side by side: what they are, and what was measured."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdq.report import metric as metrics
from kdq.report.advisor import words
from kdq.report.advisor.constraints import Constraints, best, fit
from kdq.report.advisor.rules import METHODS
from kdq.report.advisor.study import Candidate, Study
from kdq.report.aggregate import Latencies, compare_on_test, distinct_text, mean_of_all
from kdq.report.cells import format_bytes, format_energy
from kdq.schema import Qat

NOT_MEASURED = "not measured"
SHOWN = ("KD", "PTQ", "QAT", "QAD", "KD then PTQ", "mixed precision")
ABOUT = {name: METHODS[name] for name in SHOWN}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """The arm that stands for a method."""

    method: str
    candidate: Candidate | None


def choose(study: Study) -> list[Chosen]:
    """Returns of each method the arm that is best on validation."""
    usable = [c for c in study.candidates if not c.lineage.control and c.kind != "teacher"]
    return [
        Chosen(method=method, candidate=best([c for c in usable if c.method == method]))
        for method in ABOUT
    ]


def comparison(
    study: Study, picks: Sequence[Chosen], times: Latencies
) -> list[tuple[str, list[str]]]:
    """Returns (aspect, a cell for each method) in the order of `ABOUT`."""
    named = metrics.words(study.metric)
    aspects: list[tuple[str, Callable[[Chosen], str]]] = [
        ("What it is", lambda p: ABOUT[p.method].definition),
        ("Primary goal", lambda p: ABOUT[p.method].goal.format(**named)),
        ("Arm shown", lambda p: _measured(p, lambda c: f"{c.arm}: {c.bits}, {_params(c)}")),
        ("Technique used here", lambda p: _measured(p, describe_technique)),
        (f"{named['Quality']} kept, test", lambda p: _measured(p, lambda c: _score(c, study))),
        ("Size on disk", lambda p: _measured(p, lambda c: _size(c, study))),
        ("Latency", lambda p: _measured(p, lambda c: _latency(c, times))),
        ("Energy", lambda p: _measured(p, _energy)),
        ("Hardware it needs", _hardware),
        ("Training cost", lambda p: _measured(p, _cost)),
        ("When to use it", lambda p: ABOUT[p.method].when.format(**named)),
    ]
    return [(name, [cell(pick) for pick in picks]) for name, cell in aspects]


def _measured(pick: Chosen, say: Callable[[Candidate], str]) -> str:
    if pick.candidate is None:
        return f"{NOT_MEASURED}: no finished arm does it"
    return say(pick.candidate)


def _params(candidate: Candidate) -> str:
    return f"{candidate.params:,} parameters"


def describe_technique(candidate: Candidate) -> str:
    """Returns the technique as the config says it; without one, as far as records do."""
    config, parts = candidate.source.config, []
    searches = {r.search.get("method") for r in candidate.runs if r.search}
    if searches:
        parts.append(f"bits by {', '.join(sorted(map(str, searches)))}")
    arm = (config or {}).get("arms", {}).get(candidate.arm)
    if arm is None:
        observers = {r.observer for r in candidate.runs} - {""}
        return "; ".join([*parts, *observers]) or "no config: not known"
    if arm.get("bits"):
        parts.append(f"ranges by {arm.get('observer')}")
    if arm.get("ptq"):
        steps = config.get("ptq", {}).get(arm["ptq"], ())
        parts.append(" then ".join(str(step.get("method")) for step in steps))
    if arm.get("bits") and arm.get("epochs"):
        recipe = config.get("qat", {}).get(arm.get("qat"), {})
        parts.append(f"trained by {recipe.get('method', Qat().method)}")
    if arm.get("teacher"):
        parts.append(_describe_recipe(config.get("distill", {}).get(arm.get("distill"), {})))
    if arm.get("init"):
        parts.append(f"from {arm['init']}")
    return "; ".join(part for part in parts if part)


def _describe_recipe(recipe: Mapping[str, Any]) -> str:
    is_number = lambda value: isinstance(value, int | float)
    labels = recipe.get("task")
    terms = [f"labels (weight {labels:.3g})"] if is_number(labels) and labels else []
    for name, term in (recipe.get("terms") or {}).items():
        values = {key: term.get(key) for key in ("weight", "temperature")}
        parts = [f"{key} {value:g}" for key, value in values.items() if is_number(value)]
        terms.append(f"{term.get('loss', name)} ({', '.join(parts)})" if parts else name)
    return " + ".join(terms)


def _score(candidate: Candidate, study: Study) -> str:
    metric, teacher = study.metric, study.teacher(candidate.source)
    text = words.in_sentence(candidate.test, metric)
    delta = None if teacher is None else compare_on_test(candidate, teacher)[0]
    if delta is None:
        return f"{text}; no teacher of the same seeds"
    return (
        f"{text}; {words.interval(delta, metric)} {metric.difference_unit} against the teacher's "
        f"{words.in_sentence(teacher.test, metric)}"
    )


def _size(candidate: Candidate, study: Study) -> str:
    teacher = study.teacher(candidate.source)
    text = format_bytes(candidate.size_bytes)
    if teacher is None or not candidate.size_bytes:
        return text
    return f"{text}, {teacher.size_bytes / candidate.size_bytes:.1f}× smaller than the teacher"


def _latency(candidate: Candidate, times: Latencies) -> str:
    parts = []
    for (device, batch), arms in times.items():
        if candidate.arm in arms:
            mean, form = arms[candidate.arm]
            parts.append(f"{mean.mean:.3g} ms, batch {batch}, {form}, on {device}")
    return "; ".join(parts) or NOT_MEASURED


def _energy(candidate: Candidate) -> str:
    if math.isnan(candidate.energy_modelled_nj):
        return NOT_MEASURED
    energy = format_energy(candidate.energy_modelled_nj)
    return f"{energy} an example, modelled; {NOT_MEASURED}"


def _hardware(pick: Chosen) -> str:
    if pick.method == "KD":
        return "Any that computes with floats."
    if pick.candidate is None or pick.candidate.widths is None:
        return "Integer arithmetic of the chosen bits."
    widths = sorted(pick.candidate.widths)
    if widths and widths[0] >= 8:
        return "8-bit integer multiplication, as most CPUs, NPUs and GPUs have."
    return (
        f"Numbers of {widths[0] if widths else '?'} bits are unpacked to 8-bit integers unless the "
        "device multiplies fewer bits; a smaller file anywhere, faster only where kernels exist."
    )


def _cost(candidate: Candidate) -> str:
    text = f"{words.seconds(candidate)} s of training, with what it starts from"
    if candidate.mean("steps") == 0 and not candidate.seconds:
        text = "no training"
    calibration = candidate.mean("calibration_seconds")
    calibrated = not math.isnan(calibration)
    if calibrated:
        text += f"; {calibration:.2g} s of calibration"
    # What it starts from was compiled for its training; an arm that is only calibrated is no part
    # of that.
    compiled = candidate.seconds_of_compiling
    if not candidate.mean("steps"):
        compiled += mean_of_all(candidate.runs, "compile_seconds")
    if not math.isnan(compiled):
        text += f"; {compiled:.2g} s of compiling"
    elif calibrated or candidate.seconds:
        text += "; compiling included, as old records have it"
    return f"{text}; on {distinct_text(candidate.runs, 'device')}"


def find_smallest(study: Study, most: float) -> tuple[Candidate, str] | None:
    """Returns the smallest file that stays so close to the teacher on validation, how surely."""
    fits = [fit(c, Constraints(max_drop=most), study) for c in study.candidates]
    fits = [f for f in fits if f.satisfies and not f.candidate.lineage.control]
    if not fits:
        return None
    least = min(fits, key=lambda f: (f.candidate.size_bytes, not f.certain))
    return least.candidate, "" if least.certain else "likely: not all of its interval does"
