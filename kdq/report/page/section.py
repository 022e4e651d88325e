"""All that the page says of one experiment, as plain data for the template."""

import dataclasses
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdq.fields import ConfigError
from kdq.report import metric as metrics
from kdq.report.advise import advise
from kdq.report.advisor import words
from kdq.report.advisor.constraints import Constraints, best, drop
from kdq.report.advisor.document import Block, find_section
from kdq.report.advisor.study import Study, studies
from kdq.report.aggregate import distinct, latencies
from kdq.report.cells import format_bytes, without_count
from kdq.report.notes import (
    compiling_note,
    intervals_note,
    quick_note,
    seeds_note,
    versions_of,
)
from kdq.report.page import methods, specs, tables, tradeoff, views
from kdq.report.page.combine import Experiment
from kdq.report.page.marks import Point, Spec
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks import Task

POLICIES = 24  # arms of a chart of bits
# Parts of the page that only some tasks have -> what measures them, of `kdq.evaluate`.
PROBES = {
    "calibration": "classification",
    "confusions": "classification",
    "attributions": "attribution",
}
OLD_RUN_NOTE = "It is kept by runs of this version: run the experiment again in a new folder."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of the page and a file beside it."""

    name: str
    title: str
    specs: tuple[Spec, ...]  # side by side in the file
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The part of the page of one experiment."""

    experiment: Experiment
    results: tables.Grid
    fidelity: tables.Grid
    commands: Mapping[str, str]  # by arm
    answer: Sequence[str]
    advice: Sequence[Block]
    comparison: Sequence[tuple[str, list[str]]]
    charts: Mapping[str, Sequence[Chart]]  # by the part of the page
    layers: Mapping[str, tables.Grid]  # by arm
    attributions: Sequence[Mapping[str, Any]]
    failures: Sequence[str]
    problems: Sequence[str]
    missing: Mapping[str, str]  # part -> why there is nothing
    absent: frozenset[str]  # parts that its task does not have
    notes: Mapping[str, str]  # once, instead of at each number
    facts: Sequence[tuple[str, str]]


def build_section(experiment: Experiment, constraints: Constraints) -> Section:
    """Returns the section of an experiment; `constraints` are those of the advisor."""
    rows, times = experiment.rows, latencies(experiment.records)
    plain = without_count if experiment.one_seed else lambda text: text
    study, advice, problems = _ask_advisor(experiment, constraints)
    answer, comparison, picked = [], [], []
    if study:
        picks = methods.choose(study)
        picked = [pick.candidate.arm for pick in picks if pick.candidate]
        answer = _answer(advice, study, constraints)
        comparison = methods.comparison(study, picks, times)
    teacher = next((r.arm for r in rows if r.kind == "teacher"), None)
    student = next((r.arm for r in rows if r.kind in ("labels", "student")), None)
    shown = list(dict.fromkeys(arm for arm in (teacher, student, *picked) if arm))
    searched = [r.arm for r in experiment.records if r.policy and r.status == "ok"]
    drawn = list(dict.fromkeys([*shown, *searched]))[:POLICIES]
    details, lost = views.collect_details(experiment, drawn)
    of_shown = {arm: details[arm] for arm in shown if arm in details}
    layers = views.layers_of_arms(details, drawn)
    points = views.arm_points(rows, views.find_starts(study) if study else {}, times)
    confusions, most = _confusion_charts(details, [a for a in shown if a != teacher], teacher)
    charts = {
        "fronts": _front_charts(experiment, points),
        "layers": _layer_charts(layers, shown, metrics.distance_metric(experiment.task)),
        "training": _training_charts(experiment),
        "fidelity": _fidelity_charts(experiment, points),
        "calibration": _reliability_charts(of_shown),
        "confusions": confusions,
    }
    more = [f"and {len(lost) - 3} more files of details"] if len(lost) > 3 else []
    return Section(
        experiment=experiment,
        results=tables.results_grid(experiment),
        fidelity=tables.fidelity_grid(experiment),
        commands={row.arm: command(experiment, row.arm) for row in rows},
        answer=list(map(plain, answer)),
        advice=[_plainly(block, plain) for block in advice],
        comparison=[(aspect, list(map(plain, cells))) for aspect, cells in comparison],
        charts=charts,
        layers=_layer_grids(layers, shown, experiment.task),
        attributions=views.attribution_maps(of_shown),
        failures=[f"{r.arm}, seed {seed}: {reason}" for r in rows for seed, reason in r.failures],
        problems=[*experiment.problems, *problems, *lost[:3], *more],
        missing=_missing(charts, experiment),
        absent=_absent(charts, experiment.task),
        notes=_notes(experiment) | {"confusions": most},
        facts=_facts(experiment),
    )


def _ask_advisor(
    experiment: Experiment, constraints: Constraints
) -> tuple[Study | None, Sequence[Block], list[str]]:
    """Returns what the advisor says, and why it can't judge all or some of the records."""
    evidence, problems = experiment.evidence()
    try:
        if evidence.runs:
            return studies([evidence])[0], advise([evidence], constraints).blocks, problems
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        problems.append(f"the advisor can't judge {experiment.name}: {error!r}")
    return None, (), problems


def _notes(experiment: Experiment) -> dict[str, str]:
    """Returns what is said once, instead of at each number."""
    seeds = {row.seeds for row in experiment.rows if row.seeds}
    plain = without_count if experiment.one_seed else lambda text: text
    compared = [row.difference for row in experiment.rows if row.difference]
    intervals = any(not math.isnan(difference.low) for difference in compared)
    same = f"Each arm has the seeds {words.ranges(next(iter(seeds)))}." if len(seeds) == 1 else ""
    return {
        "seeds": seeds_note(experiment.rows) or same,
        "quick": quick_note(experiment.rows),
        "compiling": compiling_note(experiment.rows),
        "difference": experiment.metric.difference_unit or metrics.named(experiment.metric),
        "intervals": plain(intervals_note(experiment.rows)) if intervals else "",
    }


def _plainly(block: Block, plain: Callable[[str], str]) -> Block:
    rows = tuple(tuple(map(plain, row)) for row in block.rows)
    return dataclasses.replace(block, text=plain(block.text), rows=rows)


def _answer(advice: Sequence[Block], study: Study, constraints: Constraints) -> list[str]:
    """Returns the advisor's own first words, and how far one can go.

    Without constraints these words are only that the most accurate network will do: left out.
    """
    limited = constraints != Constraints()
    texts = [_uncited(block.text) for block in find_section(advice, "Answer") if limited]
    texts += _how_far(study)
    return texts + [_uncited(b.text) for b in advice if b.text.startswith("In short")]


def _how_far(study: Study) -> list[str]:
    """Returns which file is the smallest that is level with the teacher on validation."""
    metric = study.metric
    unit = metric.difference_unit
    near = f"{metric.level:g} {words.level_unit(metric)}"
    score = lambda values: words.in_sentence(values, metric)
    behind = lambda arm: words.interval(drop(arm, study), metric)
    smallest = methods.find_smallest(study, metric.level)
    teacher = next((c for c in study.candidates if c.kind == "teacher"), None)
    if teacher is None:
        return []
    if smallest and smallest[0].kind != "teacher":
        arm, unsure = smallest
        likely = f" ({unsure})" if unsure else ""
        ratio = teacher.size_bytes / arm.size_bytes if arm.size_bytes else 1
        return [
            f"{arm.method}, {arm.bits}, is as far as one can go: {arm.arm} is the smallest file "
            f"within {near} of the teacher on validation{likely}. "
            f"{format_bytes(arm.size_bytes)}, {ratio:.1f} times smaller; {score(arm.validation)} "
            f"on validation, {behind(arm)} {unit} against the teacher; {score(arm.test)} on test."
        ]
    other = best([c for c in study.candidates if c.kind != "teacher"])
    if other is None:
        return []
    return [
        f"No smaller file is within {near} of the teacher on validation. The best is {other.arm} "
        f"({other.method}, {other.bits}): {format_bytes(other.size_bytes)}, {behind(other)} {unit} "
        "against the teacher."
    ]


def _uncited(text: str) -> str:
    """Returns a text without the numbers of rows, which only the whole advice resolves."""
    return re.sub(r" \[\d+(, \d+)*\]$", "", text)


def command(experiment: Experiment, arm: str) -> str:
    """Returns what runs an arm again, in a new folder."""
    folder = next((f for f in experiment.folders if f.config and arm in f.config["arms"]), None)
    config = f"configs/saved/workdir.py:{folder.path}" if folder else "CONFIG"
    seeds = [str(r.seed) for r in experiment.records if r.arm == arm]
    parts = ["python", "launch/train.py", f"--config={config}", "--workdir=runs/again"]
    parts += [f"--arm={arm}", f"--config.seeds={','.join(seeds)}"]
    return " ".join(shlex.quote(part) for part in parts)


def _front_charts(experiment: Experiment, points: Sequence[Point]) -> list[Chart]:
    metric = experiment.metric
    name, first = metric.name, metrics.named(metric, first=True)
    costs = [("size", "size on disk, KiB", f"{name}_vs_size")]
    for i, (device, batch) in enumerate(latencies(experiment.records), 1):
        title = f"latency of a batch of {batch}, ms, on {device}"
        costs.append((str((device, batch)), title, f"{name}_vs_latency_{i}"))
    costs.append(("energy", "energy of an example, nJ, modelled", f"{name}_vs_energy_modelled"))
    charts = []
    for key, title, file in costs:
        if drawn := tradeoff.pareto(points, key, title, metric):
            note = "Arms of equal cost stand side by side." if key == "size" else ""
            charts.append(
                Chart(name=file, title=f"{first} against {title}", specs=tuple(drawn), note=note)
            )
    return charts


def _training_charts(experiment: Experiment) -> list[Chart]:
    metric = experiment.metric
    validation, losses = views.training_curves(experiment)
    charts = []
    if validation:
        spec = specs.curves(validation, "score", metrics.axis(metric, "validation"))
        title = f"Validation {metrics.named(metric)}, mean over seeds"
        charts.append(Chart(name=f"validation_{metric.name}", title=title, specs=(spec,)))
    if losses:
        spec = specs.curves(losses, "loss", "training loss")
        note = "Losses of different recipes have different terms: compare shapes, not heights."
        title = "Training loss of the first seed, means of windows"
        charts.append(Chart(name="training_loss", title=title, specs=(spec,), note=note))
    return charts


def _fidelity_charts(experiment: Experiment, points: Sequence[Point]) -> list[Chart]:
    points = [
        p for p in points if None not in (p["fidelity"], p["score"]) and p["kind"] != "teacher"
    ]
    if not points:
        return []
    metric, nearness = experiment.metric, metrics.fidelity_metrics(experiment.task)[0]
    likeness = metrics.likeness(nearness).partition(",")[0]
    title = f"{likeness[:1].upper()}{likeness[1:]} against {metrics.named(metric)}"
    spec = specs.fidelity(points, metric, nearness)
    return [Chart(name=f"{nearness.name}_vs_{metric.name}", title=title, specs=(spec,))]


def _reliability_charts(details: views.Details) -> list[Chart]:
    bins = views.reliability_bins(details)
    if not bins:
        return []
    title = "Reliability on test, all seeds"
    return [Chart(name="reliability", title=title, specs=(specs.reliability(bins),))]


def _confusion_charts(
    details: views.Details, arms: Sequence[str], teacher: str | None
) -> tuple[list[Chart], str]:
    """Returns a chart an arm, and the examples at the end of the scale that they share."""
    if teacher is None:
        return [], ""
    every = {arm: views.confusion_cells(details, arm, teacher) for arm in arms}
    most = max((abs(c["difference"]) for cells in every.values() for c in cells), default=0) or 1
    charts = []
    for arm, cells in every.items():
        if not cells:
            continue
        classes = 1 + max(c["class"] for c in cells)
        if classes > specs.MOST_CLASSES:  # the pairs that changed most
            cells = sorted(cells, key=lambda c: -abs(c["difference"]))[:60]
        charts.append(
            Chart(
                name=f"confusions_{len(charts) + 1}",
                title=f"{arm} less {teacher}",
                specs=(specs.confusion_difference(cells, most),),
            )
        )
    return charts, f"{most:.3g}"


def _layer_charts(
    layers: Mapping[str, Sequence[Mapping[str, Any]]], shown: Sequence[str], distance: Metric
) -> list[Chart]:
    cells = [
        {
            "arm": arm,
            "layer": row["path"] or "(root)",
            "bits": views.width_name(row),
            "weight_bits": min(row["weight_bits"], 8),
            "sensitivity": row["sensitivity"],
        }
        for arm, rows in layers.items()
        for row in rows
    ]
    if not cells:
        return []
    title = "Bits of each layer: weights and inputs"
    charts = [Chart(name="bits_by_layer", title=title, specs=(specs.bits_by_layer(cells),))]
    measured = [c for c in cells if (c["sensitivity"] or 0) > 0 and c["arm"] in shown]
    if measured:
        measure = metrics.named(distance).removesuffix(" to teacher")
        title = f"{measure} with this layer alone quantized{metrics.in_unit(distance)}"
        arms = [arm for arm in shown if arm in layers]
        charts.append(
            Chart(
                name="sensitivity",
                title="Sensitivity: what each layer's quantizer alone does to the outputs",
                specs=(specs.sensitivity(measured, arms, title),),
                note=f"{measure} to the same weights without any quantizer, on validation, of "
                "the first seed. Of a network trained with quantizers those are not a network "
                "that anybody would use.",
            )
        )
    return charts


def _missing(charts: Mapping[str, Sequence[Chart]], experiment: Experiment) -> dict[str, str]:
    """Returns why a part of the page is empty, and what to run."""
    again = command(experiment, experiment.rows[0].arm).partition(" --arm=")[0]
    again = again.replace("launch/train.py", "launch/compress.py")
    detail = f"No details of the arms shown were found. {OLD_RUN_NOTE} {again}"
    name = metrics.named(experiment.metric)
    texts = {
        "training": "No metrics.jsonl of a trained arm is there.",
        "fidelity": "No arm was compared with the teacher, which failed or is not there.",
        "fronts": f"No arm has {'an' if name[0] in 'aeiouRM' else 'a'} {name} and a cost.",
        "layers": f"No quantized arm has details by layer. {OLD_RUN_NOTE} {again}",
        **dict.fromkeys(("calibration", "confusions"), detail),
        "attributions": f"Only images have maps. {detail}",
    }
    return {part: text for part, text in texts.items() if not charts.get(part)}


def _absent(charts: Mapping[str, Sequence[Chart]], task: "Task") -> frozenset[str]:
    """Returns the parts of the page that a task does not have."""
    without = (part for part, probe in PROBES.items() if probe not in task.probes)
    return frozenset(part for part in without if not charts.get(part))


def _layer_grids(
    layers: Mapping[str, Sequence[Mapping[str, Any]]], shown: Sequence[str], task: "Task"
) -> dict[str, tables.Grid]:
    return {arm: tables.layer_grid(rows, task) for arm, rows in layers.items() if arm in shown}


def _facts(experiment: Experiment) -> list[tuple[str, str]]:
    listed = lambda field: ", ".join(distinct(experiment.records, field)) or "not recorded"
    data = ", ".join(f"{split} {digest[:12]}" for split, digest in experiment.data.items())
    versions = [
        f"{name} {version}"
        for name, each in versions_of(experiment.records).items()
        for version in each
    ]
    return [
        ("Folders", ", ".join(folder.path for folder in experiment.folders)),
        ("Digests of the data", data or "not recorded"),
        ("Config digests", listed("config_digest")),
        ("Commits", listed("commit")),
        ("Devices", "; ".join(experiment.devices) or "not recorded"),
        ("Versions", ", ".join(versions) or "not recorded"),
    ]
