"""All that the page says of one experiment, as plain data for the template."""

import dataclasses
import functools
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from kdq.fields import ConfigError
from kdq.report import metric as metrics
from kdq.report.advise import advise
from kdq.report.advisor.constraints import Constraints, best, fit
from kdq.report.advisor.document import Block, Document
from kdq.report.advisor.rules import METHODS
from kdq.report.advisor.study import Study, studies
from kdq.report.aggregate import latencies
from kdq.report.cells import without_count
from kdq.report.page import specs, tables, tradeoff, views
from kdq.report.page.combine import Experiment
from kdq.report.page.specs import Spec
from kdq.schema import Qat

COMPARED = ("KD", "PTQ", "QAT", "QAD", "KD then PTQ", "mixed precision")
ABOUT = {name: METHODS[name] for name in COMPARED}
MOST_CLASSES = 20  # of a map of confusions that can be read
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
    specs: Sequence[Spec]  # side by side in the file
    note: str = ""


class Section:
    """The part of the page of one experiment.

    Attributes:
      plain: leaves out of a text that numbers are of one seed, where all are.
      answer, advice, comparison: what the advisor says first, all of it, and methods side by side.
      problems: what was left out, and why.
      charts: by the part of the page.
      layers: tables by arm.
      missing, absent: why a part is empty; parts that the experiment's task does not have.
    """

    def __init__(self, experiment: Experiment, constraints: Constraints):
        self.experiment, self._times = experiment, latencies(experiment.records)
        self.plain = without_count if experiment.one_seed else str
        evidence, problems = experiment.evidence()
        self._study: Study | None = None
        self.advice: Sequence[Block] = ()
        try:
            if evidence.runs:
                advice = advise([evidence], constraints).blocks
                self._study, self.advice = studies([evidence])[0], advice
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            problems.append(f"the advisor can't judge {experiment.name}: {error!r}")
        self.answer = self._answer(constraints) if self._study else []
        for block in self.advice:
            block.text = self.plain(block.text)
            block.rows = [tuple(map(self.plain, row)) for row in block.rows]
        # Of each method the arm that is best on validation.
        arms = self._study.candidates if self._study else ()
        usable = [c for c in arms if not c.lineage.control and c.kind != "teacher"]
        picks = {method: best([c for c in usable if c.method == method]) for method in ABOUT}
        self.comparison = self._compare(picks) if self._study else []
        rows = experiment.rows
        self.teacher = next((r.arm for r in rows if r.kind == "teacher"), None)
        student = next((r.arm for r in rows if r.kind in ("labels", "student")), None)
        picked = [arm.arm for arm in picks.values() if arm]
        shown = list(dict.fromkeys(arm for arm in (self.teacher, student, *picked) if arm))
        searched = [r.arm for r in experiment.records if r.policy and r.status == "ok"]
        drawn = list(dict.fromkeys([*shown, *searched]))[:POLICIES]
        details, lost = views.collect_details(experiment, drawn)
        self._shown = {arm: details.get(arm, {}) for arm in shown}
        self._layers = views.layers_of_arms(details, drawn)
        more = [f"and {len(lost) - 3} more files of details"] if len(lost) > 3 else []
        self.problems = [*experiment.problems, *problems, *lost[:3], *more]

    def _answer(self, constraints: Constraints) -> list[str]:
        """Returns the advisor's own first words, and how far one can go.

        Without constraints these words are only that the most accurate network will do: left out.
        """
        study, texts = self._study, []
        if constraints != Constraints():
            after = itertools.dropwhile(lambda block: block.text != "Answer", self.advice)
            below = itertools.islice(after, 1, None)
            texts += [b.text for b in itertools.takewhile(lambda b: b.kind != "heading", below)]
        teacher = next((c for c in study.candidates if c.kind == "teacher"), None)
        if teacher is not None:
            near = Constraints(max_drop=study.metric.level)
            usable = [c for c in study.candidates if not c.lineage.control]
            fits = [f for f in (fit(c, near, study) for c in usable) if f.satisfies]
            order = lambda f: (f.candidate.size_bytes, not f.certain)
            document = Document(
                "answer.txt",
                smallest=min(fits, key=order, default=None),
                other=best([c for c in study.candidates if c.kind != "teacher"]),
                **{"teacher": teacher, "study": study, "m": study.metric},
            )
            texts += [block.text for block in document.blocks]
        texts += [block.text for block in self.advice if block.text.startswith("In short")]
        # The numbers of rows are for the whole advice, which lists these.
        return [self.plain(re.sub(r" \[\d+(, \d+)*\]$", "", text)) for text in texts]

    def _compare(self, picks: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
        """Returns (aspect, a cell for each method) in the order of `ABOUT`."""
        study = self._study
        document = Document(
            "methods.txt",
            picks=picks,
            about=ABOUT,
            named=metrics.words(study.metric),
            times=self._times,
            default_qat=Qat().method,
            study=study,
            m=study.metric,
        )
        return [(row[0], list(map(self.plain, row[1:]))) for row in document.blocks[0].rows]

    @functools.cached_property
    def charts(self) -> dict[str, list[Chart]]:
        """The charts, by the part of the page."""
        experiment, metric = self.experiment, self.experiment.metric
        starts = views.find_starts(self._study) if self._study else {}
        points = views.arm_points(experiment.rows, starts, self._times)
        named, first = metrics.named(metric), metrics.named(metric, first=True)
        costs = [("size", "size on disk, KiB", "size")]
        for i, (device, batch) in enumerate(self._times, 1):
            title = f"latency of a batch of {batch}, ms, on {device}"
            costs.append((str((device, batch)), title, f"latency_{i}"))
        costs.append(("energy", "energy of an example, nJ, modelled", "energy_modelled"))
        fronts = []
        for key, title, name in costs:
            note = "Arms of equal cost stand side by side." if key == "size" else ""
            drawn = tradeoff.pareto(points, key, title, metric)
            chart = {"name": f"{metric.name}_vs_{name}", "title": f"{first} against {title}"}
            fronts += [Chart(**chart, specs=drawn, note=note)] if drawn else []
        fidelity = []
        known = [p for p in points if None not in (p["fidelity"], p["score"])]
        if students := [p for p in known if p["kind"] != "teacher"]:
            nearness = metrics.fidelity_metrics(experiment.task)[0]
            likeness = metrics.likeness(nearness).partition(",")[0]
            title = f"{likeness[:1].upper()}{likeness[1:]} against {named}"
            axes = {"across": metrics.axis(metric, "test"), "up": metrics.likeness(nearness)}
            spec = specs.chart("fidelity", **axes, **specs.arm_values(students))
            name = f"{nearness.name}_vs_{metric.name}"
            fidelity.append(Chart(name=name, title=title, specs=[spec]))
        bins, title = views.reliability_bins(self._shown), "Reliability on test, all seeds"
        colors = specs.arm_colors(list(dict.fromkeys(each["arm"] for each in bins)))
        spec = specs.chart("reliability", bins=bins, arms=colors)
        return {
            "fronts": fronts,
            "layers": self._layer_charts(),
            "training": self._training_charts(),
            "fidelity": fidelity,
            "calibration": [Chart(name="reliability", title=title, specs=[spec])] if bins else [],
            "confusions": self._confusion_charts(),
        }

    def _training_charts(self) -> list[Chart]:
        metric, charts = self.experiment.metric, []
        validation, losses = views.training_curves(self.experiment)
        if validation:
            spec = specs.curves(validation, "score", metrics.axis(metric, "validation"))
            title = f"Validation {metrics.named(metric)}, mean over seeds"
            charts.append(Chart(name=f"validation_{metric.name}", title=title, specs=[spec]))
        if losses:
            spec = specs.curves(losses, "loss", "training loss")
            note = "Losses of different recipes have different terms: compare shapes, not heights."
            title = "Training loss of the first seed, means of windows"
            charts.append(Chart(name="training_loss", title=title, specs=[spec], note=note))
        return charts

    @functools.cached_property
    def _confusions(self) -> dict[str, list[dict[str, Any]]]:
        arms = [arm for arm in self._shown if self.teacher and arm != self.teacher]
        cells = {arm: views.confusion_cells(self._shown, arm, self.teacher) for arm in arms}
        return {arm: each for arm, each in cells.items() if each}

    @functools.cached_property
    def most_confused(self) -> float:
        """Examples at the end of the scale that charts of confusions share."""
        differences = (abs(c["difference"]) for each in self._confusions.values() for c in each)
        return max(differences, default=0) or 1

    def _confusion_charts(self) -> list[Chart]:
        charts = []
        for i, (arm, cells) in enumerate(self._confusions.items(), 1):
            if 1 + max(c["class"] for c in cells) > MOST_CLASSES:
                cells = sorted(cells, key=lambda c: -abs(c["difference"]))[:60]  # changed most
            most = self.most_confused
            spec = specs.chart("confusions", cells=cells, domain=[-most, 0, most])
            title = f"{arm} less {self.teacher}"
            charts.append(Chart(name=f"confusions_{i}", title=title, specs=[spec]))
        return charts

    def _layer_charts(self) -> list[Chart]:
        cells = [
            {
                "arm": arm,
                "layer": row["path"] or "(root)",
                "bits": views.width_name(row),
                "weight_bits": min(row["weight_bits"], 8),
                "sensitivity": row["sensitivity"],
            }
            for arm, rows in self._layers.items()
            for row in rows
        ]
        if not cells:
            return []
        title = "Bits of each layer: weights and inputs"
        charts = [Chart(name="bits_by_layer", title=title, specs=[specs.bits_by_layer(cells)])]
        sensitive = [c for c in cells if (c["sensitivity"] or 0) > 0 and c["arm"] in self._shown]
        if sensitive:
            distance = metrics.distance_metric(self.experiment.task)
            measure = metrics.named(distance).removesuffix(" to teacher")
            axis = f"{measure} with this layer alone quantized{metrics.in_unit(distance)}"
            arms = [arm for arm in self._shown if arm in self._layers]
            charts.append(
                Chart(
                    name="sensitivity",
                    title="Sensitivity: what each layer's quantizer alone does to the outputs",
                    specs=[specs.sensitivity(sensitive, arms, axis)],
                    note=f"{measure} to the same weights without any quantizer, on validation, of "
                    "the first seed. Of a network trained with quantizers those are not a network "
                    "that anybody would use.",
                )
            )
        return charts

    @property
    def layers(self) -> dict[str, tables.Grid]:
        """Tables of layers, by arm."""
        task, arms = self.experiment.task, [arm for arm in self._layers if arm in self._shown]
        return {arm: tables.layer_grid(self._layers[arm], task) for arm in arms}

    @property
    def attributions(self) -> list[dict[str, Any]]:
        """Maps, by arm."""
        return views.attribution_maps(self._shown)

    @property
    def commands(self) -> dict[str, str]:
        """Commands that run an arm again, in a new folder."""
        experiment, commands = self.experiment, {}
        for arm in (row.arm for row in experiment.rows):
            configs = (f for f in experiment.folders if f.config and arm in f.config["arms"])
            folder = next(configs, None)
            config = f"configs/saved/workdir.py:{folder.path}" if folder else "CONFIG"
            seeds = ",".join(str(r.seed) for r in experiment.records if r.arm == arm)
            parts = ["python", "launch/train.py", f"--config={config}", "--workdir=runs/again"]
            parts += [f"--arm={arm}", f"--config.seeds={seeds}"]
            commands[arm] = " ".join(map(shlex.quote, parts))
        return commands

    @property
    def missing(self) -> dict[str, str]:
        """Why a part of the page is empty, and what to run."""
        again = self.commands[self.experiment.rows[0].arm].partition(" --arm=")[0]
        again = again.replace("launch/train.py", "launch/compress.py")
        detail = f"No details of the arms shown were found. {OLD_RUN_NOTE} {again}"
        name = metrics.named(self.experiment.metric)
        texts = {
            "training": "No metrics.jsonl of a trained arm is there.",
            "fidelity": "No arm was compared with the teacher, which failed or is not there.",
            "fronts": f"No arm has {'an' if name[0] in 'aeiouRM' else 'a'} {name} and a cost.",
            "layers": f"No quantized arm has details by layer. {OLD_RUN_NOTE} {again}",
            **dict.fromkeys(("calibration", "confusions"), detail),
            "attributions": f"Only images have maps. {detail}",
        }
        return {part: text for part, text in texts.items() if not self.charts.get(part)}

    @property
    def absent(self) -> list[str]:
        """Parts of the page that the task does not have."""
        probes = self.experiment.task.probes
        without = [part for part, probe in PROBES.items() if probe not in probes]
        return [part for part in without if not self.charts.get(part)]
