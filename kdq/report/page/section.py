"""All that the page says of one experiment, as plain data for the template."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdq.fields import ConfigError
from kdq.report.advise import advise
from kdq.report.advisor.constraints import Constraints, drop
from kdq.report.advisor.document import Block, ranges
from kdq.report.advisor.evidence import Study, studies
from kdq.report.advisor.words import interval, percent
from kdq.report.cells import format_bytes, format_energy, without_count
from kdq.report.notes import compiling_note, quick_note, seeds_note
from kdq.report.page import methods, specs, tables, tradeoff, views
from kdq.report.page.combine import Experiment
from kdq.report.page.specs import Spec
from kdq.report.page.times import latencies

CLOSE = 1.0  # points below the teacher that "how far" allows
POLICIES = 24  # arms of a chart of bits
OF_OLD = "It is kept by runs of this version: run the experiment again in a new folder."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of the page and a file beside it."""

    name: str
    title: str
    specs: tuple[Spec, ...]  # side by side in the file
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One experiment."""

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
    said: Mapping[str, str]  # once, instead of at each number
    facts: Sequence[tuple[str, str]]


def section(experiment: Experiment, constraints: Constraints) -> Section:
    """Of an experiment; `constraints` are those of the advisor."""
    source, problems = experiment.source()
    problems = [*experiment.problems, *problems]
    study, advice, answer = None, (), []
    try:
        advice = advise([source], constraints).blocks if source.records else ()
        study = next(iter(studies([source])), None)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        problems.append(f"the advisor can't judge {experiment.name}: {error!r}")
    times = latencies(experiment.records)
    picks = methods.chosen(study) if study else []
    arms = [p.candidate.arm for p in picks if p.candidate]
    if study:
        answer = _answer(advice, study, constraints)
    teacher = next((r.arm for r in experiment.rows if r.kind == "teacher"), None)
    student = next((r.arm for r in experiment.rows if r.kind in ("labels", "student")), None)
    shown = list(dict.fromkeys(a for a in (teacher, student, *arms) if a))
    searched = [r["arm"] for r in experiment.records if r.get("policy") and r["status"] == "ok"]
    wanted = list(dict.fromkeys([*shown, *searched]))[:POLICIES]
    details, lost = views.details(experiment, wanted)
    layers = views.layers(details, wanted)
    starts = views.starts(study) if study else {}
    points = views.points(experiment, starts)
    confusions, most = _confusions(details, [a for a in shown if a != teacher], teacher)
    charts = {
        "fronts": _fronts(experiment, points),
        "layers": _layers(layers, shown),
        "training": _training(experiment),
        "fidelity": _fidelity(points),
        "calibration": _reliability({arm: details[arm] for arm in shown if arm in details}),
        "confusions": confusions,
    }
    plain = without_count if experiment.one_seed else lambda text: text
    return Section(
        experiment=experiment,
        results=tables.results(experiment),
        fidelity=tables.fidelity(experiment),
        commands={row.arm: command(experiment, row.arm) for row in experiment.rows},
        answer=[plain(text) for text in answer],
        advice=[_plainly(block, plain) for block in advice],
        comparison=[
            (aspect, [plain(cell) for cell in cells])
            for aspect, cells in (methods.comparison(study, picks, times) if study else ())
        ],
        charts=charts,
        layers={arm: layer_grid(rows) for arm, rows in layers.items() if arm in shown},
        attributions=views.attributions({a: details[a] for a in shown if a in details}),
        failures=[
            f"{row.arm}, seed {seed}: {reason}"
            for row in experiment.rows
            for seed, reason in row.failures
        ],
        problems=[*problems, *_some(lost)],
        missing=_missing(charts, experiment),
        said={
            "seeds": _seeds(experiment),
            "quick": quick_note(experiment.rows),
            "compiling": compiling_note(experiment.rows),
            "confusions": most,
        },
        facts=_facts(experiment),
    )


def _plainly(block: Block, plain: Callable[[str], str]) -> Block:
    rows = tuple(tuple(map(plain, row)) for row in block.rows)
    return dataclasses.replace(block, text=plain(block.text), rows=rows)


def _seeds(experiment: Experiment) -> str:
    """Returns the seeds that all finished arms share, in words; "" where they differ."""
    if said := seeds_note(experiment.rows):
        return said
    every = {row.seeds for row in experiment.rows if row.seeds}
    return f"Each arm has the seeds {ranges(every.pop())}." if len(every) == 1 else ""


def _some(lost: Sequence[str]) -> list[str]:
    more = [f"and {len(lost) - 3} more files of details"] if len(lost) > 3 else []
    return [*lost[:3], *more]


def _answer(advice: Sequence[Block], study: Study, constraints: Constraints) -> list[str]:
    """The advisor's own first words, and how far one can go.

    Without constraints these words are only that the most accurate network will do: left out.
    """
    place = next(
        (i for i, b in enumerate(advice) if (b.kind, b.text) == ("heading", "Answer")), None
    )
    said = []
    limited = constraints != Constraints()
    for block in advice[place + 1 :] if limited and place is not None else ():
        if block.kind == "heading":
            break
        said.append(_uncited(block.text))
    found = methods.smallest_within(study, CLOSE)
    teachers = [c for c in study.candidates if c.kind == "teacher"]
    if found and teachers and found[0].kind != "teacher":
        arm, unsure = found
        far = drop(arm, study)
        likely = f" ({unsure})" if unsure else ""
        ratio = teachers[0].size_bytes / arm.size_bytes if arm.size_bytes else 1
        said.append(
            f"{arm.method}, {arm.bits}, is as far as one can go: {arm.arm} is the smallest file "
            f"within {CLOSE:g} point of the teacher on validation{likely}. "
            f"{format_bytes(arm.size_bytes)}, {ratio:.1f} times smaller; {percent(arm.validation)} "
            f"on validation, {interval(far)} points against the teacher; {percent(arm.test)} on "
            "test."
        )
    elif teachers and (near := methods.nearest(study)):
        said.append(
            f"No smaller file is within {CLOSE:g} point of the teacher on validation. "
            f"The best is {near.arm} ({near.method}, {near.bits}): "
            f"{format_bytes(near.size_bytes)}, {interval(drop(near, study))} points against the "
            "teacher."
        )
    said += [_uncited(b.text) for b in advice if b.text.startswith("In short")]
    return said


def _uncited(text: str) -> str:
    """Without the numbers of rows, which only the whole advice resolves."""
    return re.sub(r" \[\d+(, \d+)*\]$", "", text)


def command(experiment: Experiment, arm: str) -> str:
    """What runs an arm again, in a new folder."""
    folder = next((f for f in experiment.folders if f.config and arm in f.config["arms"]), None)
    config = f"configs/saved/workdir.py:{folder.path}" if folder else "CONFIG"
    runs = [r for r in experiment.records if r["arm"] == arm]
    parts = ["python", "launch/train.py", f"--config={config}", "--workdir=runs/again"]
    parts += [f"--arm={arm}", f"--config.seeds={','.join(str(r['seed']) for r in runs)}"]
    return " ".join(shlex.quote(part) for part in parts)


def _fronts(experiment: Experiment, points: Sequence[Mapping[str, Any]]) -> list[Chart]:
    costs = [("size", "size on disk, KiB", "accuracy_vs_size")]
    for i, (device, batch) in enumerate(latencies(experiment.records)):
        title = f"latency of a batch of {batch}, ms, on {device}"
        costs.append((str((device, batch)), title, f"accuracy_vs_latency_{i + 1}"))
    costs.append(("energy", "energy of an example, nJ, modelled", "accuracy_vs_energy_modelled"))
    charts = []
    for key, title, name in costs:
        if found := tradeoff.pareto(points, key, title):
            note = "Arms of equal cost stand side by side." if key == "size" else ""
            charts.append(
                Chart(name=name, title=f"Accuracy against {title}", specs=tuple(found), note=note)
            )
    return charts


def _training(experiment: Experiment) -> list[Chart]:
    validation, losses = views.training(experiment)
    charts = []
    if validation:
        spec = specs.curves(validation, "accuracy", "validation accuracy, %")
        title = "Validation accuracy, mean over seeds"
        charts.append(Chart(name="validation_accuracy", title=title, specs=(spec,)))
    if losses:
        spec = specs.curves(losses, "loss", "training loss")
        note = "Losses of different recipes have different terms: compare shapes, not heights."
        title = "Training loss of the first seed, means of windows"
        charts.append(Chart(name="training_loss", title=title, specs=(spec,), note=note))
    return charts


def _fidelity(points: Sequence[Mapping[str, Any]]) -> list[Chart]:
    points = [
        p for p in points if None not in (p["agreement"], p["accuracy"]) and p["kind"] != "teacher"
    ]
    if not points:
        return []
    title = "Agreement with the teacher against accuracy"
    return [Chart(name="agreement_vs_accuracy", title=title, specs=(specs.fidelity(points),))]


def _reliability(details: views.Details) -> list[Chart]:
    bins = views.reliability(details)
    if not bins:
        return []
    title = "Reliability on test, all seeds"
    return [Chart(name="reliability", title=title, specs=(specs.reliability(bins),))]


def _confusions(
    details: views.Details, arms: Sequence[str], teacher: str | None
) -> tuple[list[Chart], str]:
    """A chart an arm, and the examples at the end of the scale that they share."""
    if teacher is None:
        return [], ""
    every = {arm: views.confusion_difference(details, arm, teacher) for arm in arms}
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


def _layers(layers: Mapping[str, Sequence[Mapping[str, Any]]], shown: Sequence[str]) -> list[Chart]:
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
    charts = [
        Chart(
            name="bits_by_layer",
            title="Bits of each layer: weights and inputs",
            specs=(specs.bits_by_layer(cells),),
        )
    ]
    measured = [c for c in cells if (c["sensitivity"] or 0) > 0 and c["arm"] in shown]
    if measured:
        charts.append(
            Chart(
                name="sensitivity",
                title="Sensitivity: what each layer's quantizer alone does to the outputs",
                specs=(specs.sensitivity(measured, [a for a in shown if a in layers]),),
                note="KL to the same weights without any quantizer, on validation, of "
                "the first seed. Of a network trained with quantizers those are not a network "
                "that anybody would use.",
            )
        )
    return charts


def layer_grid(rows: Sequence[Mapping[str, Any]]) -> tables.Grid:
    """What the policy of an arm is, does and costs."""
    head = ("Layer", "Kind", "Bits", "Sensitivity, nats", "SQNR of weights, dB", "Input range")
    head += ("Weights", "Size", "MACs", "BOPs", "Energy, modelled")
    plain = lambda value, form: "—" if value is None else format(value, form)
    cells = []
    for row in rows:
        span = row["range"]
        reach = "—" if not span or None in span else f"{span[0]:.3g} to {span[1]:.3g}"
        size = row["bytes"]
        joules = row["energy_modelled_nj"]
        entries = [
            (row["path"] or "(root)", row["path"]),
            (row["kind"], row["kind"]),
            (views.width_name(row), views.width_name(row)),
            (plain(row["sensitivity"], ".2e"), row["sensitivity"]),
            (plain(row["sqnr_db"], ".1f"), row["sqnr_db"]),
            (reach, None if reach == "—" else span[1] - span[0]),
            (f"{row['weights']:,}", row["weights"]),
            (format_bytes(size), size),
            (f"{row['macs']:,}", row["macs"]),
            (f"{row['bops']:,}", row["bops"]),
            (format_energy(joules), joules),
        ]
        cells.append(tuple(tables.Cell(text=text, sort=sort) for text, sort in entries))
    names = tuple(row["path"] for row in rows)
    return tables.Grid(head=head, rows=tuple(cells), arms=names, states=("",) * len(names))


def _missing(charts: Mapping[str, Sequence[Chart]], experiment: Experiment) -> dict[str, str]:
    """Why a part of the page is empty, and what to run."""
    again = command(experiment, experiment.rows[0].arm).partition(" --arm=")[0]
    again = again.replace("launch/train.py", "launch/compress.py")
    detail = f"No details of the arms shown were found. {OF_OLD} {again}"
    said = {
        "training": "No metrics.jsonl of a trained arm is there.",
        "fidelity": "No arm has a measured agreement: the teacher failed, or is not there.",
        "fronts": "No arm has an accuracy and a cost.",
        "layers": f"No quantized arm has details by layer. {OF_OLD} {again}",
        **dict.fromkeys(("calibration", "confusions"), detail),
        "attributions": f"Only images have maps. {detail}",
    }
    return {part: text for part, text in said.items() if not charts.get(part)}


def _facts(experiment: Experiment) -> list[tuple[str, str]]:
    distinct = lambda key: list(
        dict.fromkeys(str(r[key]) for r in experiment.records if r.get(key))
    )
    data = ", ".join(f"{split} {digest[:12]}" for split, digest in experiment.data.items())
    versions = dict.fromkeys(
        f"{package} {version}"
        for record in experiment.records
        for package, version in (record.get("versions") or {}).items()
    )
    return [
        ("Folders", ", ".join(folder.path for folder in experiment.folders)),
        ("Digests of the data", data or "not recorded"),
        ("Config digests", ", ".join(distinct("config_digest")) or "not recorded"),
        ("Commits", ", ".join(distinct("commit")) or "not recorded"),
        ("Devices", "; ".join(experiment.devices) or "not recorded"),
        ("Versions", ", ".join(versions) or "not recorded"),
    ]
