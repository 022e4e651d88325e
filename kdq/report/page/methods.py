"""Knowledge distillation and quantization side by side: what they are, and what was measured."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdq.evaluate.statistics import summary
from kdq.report import Record
from kdq.report.advisor import compare
from kdq.report.advisor.constraints import Constraints, difference, fit
from kdq.report.advisor.evidence import Candidate, Study
from kdq.report.advisor.words import interval, percent, seconds
from kdq.report.aggregate import mean_of_all, number
from kdq.report.cells import format_bytes, format_energy
from kdq.report.page.times import Condition
from kdq.schema import Qat

NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a method before anything is measured."""

    title: str
    is_: str
    goal: str
    when: str


ABOUT: Mapping[str, About] = {
    "KD": About(
        title="Knowledge distillation (KD)",
        is_="A smaller float network learns from the teacher's outputs, beside the labels.",
        goal="Fewer parameters and operations at the teacher's accuracy.",
        when="The network itself is too large or too slow, there is time to train, and the device "
        "computes with floats.",
    ),
    "PTQ": About(
        title="Post-training quantization (PTQ)",
        is_="A trained network's weights and activations become integers; a few hundred examples "
        "calibrate their ranges.",
        goal="Fewer bits for each number, without training.",
        when="There is no time, no labels or no code to train with, and 8 bits or so will do.",
    ),
    "QAT": About(
        title="Quantization-aware training (QAT)",
        is_="The network is trained by labels while it rounds as the device will.",
        goal="Accuracy at few bits, where calibration alone loses it.",
        when="Fewer bits than calibration can bear, with labels, but no teacher.",
    ),
    "QAD": About(
        title="Hybrid: both at once (QAD)",
        is_="The quantized network is trained with the teacher: quantization-aware distillation.",
        goal="Accuracy at the fewest bits: the teacher says what rounding destroyed.",
        when="The fewest bits that keep the accuracy, with a teacher and time to train.",
    ),
    "KD then PTQ": About(
        title="Hybrid: one after the other (KD then PTQ)",
        is_="A student is distilled in float, then calibrated.",
        goal="A small network of few bits from two simple steps.",
        when="A distilled student is there already, and training it again is not worth it.",
    ),
    "mixed precision": About(
        title="Mixed precision",
        is_="A search gives each layer its own bits under a budget.",
        goal="The budget spent on the layers that need it.",
        when="A budget between two widths, or layers that differ much in how they bear rounding.",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """The arm that stands for a method."""

    method: str
    candidate: Candidate | None


def chosen(study: Study) -> list[Chosen]:
    """Of each method the arm that is best on validation."""
    usable = [c for c in study.candidates if not c.lineage.control and c.kind != "teacher"]
    return [
        Chosen(
            method=method,
            candidate=compare.best([c for c in usable if c.method == method]),
        )
        for method in ABOUT
    ]


def comparison(
    study: Study, picks: Sequence[Chosen], times: Mapping[Condition, Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    """(aspect, a cell for each method) in the order of `ABOUT`."""
    aspects: list[tuple[str, Callable[[Chosen], str]]] = [
        ("What it is", lambda p: ABOUT[p.method].is_),
        ("Primary goal", lambda p: ABOUT[p.method].goal),
        ("Arm shown", lambda p: _measured(p, lambda c: f"{c.arm}: {c.bits}, {_params(c)}")),
        ("Technique used here", lambda p: _measured(p, technique)),
        ("Accuracy kept, test", lambda p: _measured(p, lambda c: _accuracy(c, study))),
        ("Size on disk", lambda p: _measured(p, lambda c: _size(c, study))),
        ("Latency", lambda p: _measured(p, lambda c: _latency(c, times))),
        ("Energy", lambda p: _measured(p, _energy)),
        ("Hardware it needs", _hardware),
        ("Training cost", lambda p: _measured(p, lambda c: _cost(c, study))),
        ("When to use it", lambda p: ABOUT[p.method].when),
    ]
    return [(name, [cell(pick) for pick in picks]) for name, cell in aspects]


def _measured(pick: Chosen, say: Callable[[Candidate], str]) -> str:
    if pick.candidate is None:
        return f"{NOT_MEASURED}: no finished arm does it"
    return say(pick.candidate)


def _params(candidate: Candidate) -> str:
    return f"{candidate.params:,} parameters"


def technique(candidate: Candidate) -> str:
    """As the config of its workdir says it; without one, as far as records do."""
    config, runs = candidate.source.config, _records(candidate)
    parts = []
    searches = {s.get("method") for r in runs if (s := r.get("search"))}
    if searches:
        parts.append(f"bits by {', '.join(sorted(map(str, searches)))}")
    arm = (config or {}).get("arms", {}).get(candidate.arm)
    if arm is None:
        observers = {r.get("observer") for r in runs} - {None}
        return "; ".join([*parts, *map(str, observers)]) or "no config: not known"
    if arm.get("bits"):
        parts.append(f"ranges by {arm.get('observer')}")
    if arm.get("ptq"):
        steps = config.get("ptq", {}).get(arm["ptq"], ())
        parts.append(" then ".join(str(step.get("method")) for step in steps))
    if arm.get("bits") and arm.get("epochs"):
        recipe = config.get("qat", {}).get(arm.get("qat"), {})
        parts.append(f"trained by {recipe.get('method', Qat().method)}")
    if arm.get("teacher"):
        parts.append(_recipe(config.get("distill", {}).get(arm.get("distill"), {})))
    if arm.get("init"):
        parts.append(f"from {arm['init']}")
    return "; ".join(part for part in parts if part)


def _recipe(recipe: Mapping[str, Any]) -> str:
    terms = []
    for name, term in (recipe.get("terms") or {}).items():
        weight, warm = term.get("weight"), term.get("temperature")
        told = [f"weight {weight:g}"] if isinstance(weight, int | float) else []
        told += [f"temperature {warm:g}"] if isinstance(warm, int | float) else []
        terms.append(f"{term.get('loss', name)} ({', '.join(told)})" if told else name)
    labels = recipe.get("task")
    told = f"labels (weight {labels:.3g})" if isinstance(labels, int | float) and labels else ""
    return " + ".join([*([told] if told else []), *terms])


def _records(candidate: Candidate) -> list[Record]:
    return [r for r in candidate.source.records if r["arm"] == candidate.arm]


def _accuracy(candidate: Candidate, study: Study) -> str:
    teacher = study.teacher(candidate.source)
    text = percent(candidate.test)
    if teacher is None or (found := difference(candidate.test, teacher.test)) is None:
        return f"{text}; no teacher of the same seeds"
    return f"{text}; {interval(found)} points against the teacher's {percent(teacher.test)}"


def _size(candidate: Candidate, study: Study) -> str:
    teacher = study.teacher(candidate.source)
    text = format_bytes(candidate.size_bytes)
    if teacher is None or not candidate.size_bytes:
        return text
    return f"{text}, {teacher.size_bytes / candidate.size_bytes:.1f}× smaller than the teacher"


def _latency(candidate: Candidate, times: Mapping[Condition, Mapping[str, Any]]) -> str:
    found = []
    for (device, batch), own in times.items():
        if candidate.arm in own:
            mean, form = own[candidate.arm]
            found.append(f"{mean.mean:.3g} ms, batch {batch}, {form}, on {device}")
    return "; ".join(found) or NOT_MEASURED


def _energy(candidate: Candidate) -> str:
    energy = format_energy(candidate.energy_nj)
    return NOT_MEASURED if energy == "—" else f"{energy} an example, modelled; {NOT_MEASURED}"


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


def _cost(candidate: Candidate, study: Study) -> str:
    runs = _records(candidate)
    calibration = [number(r, "calibration_seconds") for r in runs]
    calibration = [value for value in calibration if value == value]
    text = f"{seconds(candidate)} s of training, with what it starts from"
    if candidate.steps == 0 and not candidate.seconds:
        text = "no training"
    if calibration:
        text += f"; {summary(calibration)[0]:.2g} s of calibration"
    # What it starts from was compiled for its training; an arm that is only calibrated is no part
    # of that.
    compiled = candidate.compile_seconds
    if not candidate.steps:
        compiled += mean_of_all(runs, "compile_seconds")
    if not math.isnan(compiled):
        text += f"; {compiled:.2g} s of compiling"
    elif calibration or candidate.seconds:
        text += "; compiling included, as old records have it"
    return f"{text}; on {candidate.device}"


def smallest_within(study: Study, points: float) -> tuple[Candidate, str] | None:
    """The smallest file that stays so close to the teacher on validation, and how sure that is."""
    fits = [fit(c, Constraints(max_drop=points), study) for c in study.candidates]
    fits = [f for f in fits if f.satisfies and not f.candidate.lineage.control]
    if not fits:
        return None
    least = min(fits, key=lambda f: (f.candidate.size_bytes, not f.certain))
    return least.candidate, "" if least.certain else "likely: not all of its interval does"


def nearest(study: Study) -> Candidate | None:
    """The best on validation of what is not the teacher."""
    return compare.best([c for c in study.candidates if c.kind != "teacher"])
