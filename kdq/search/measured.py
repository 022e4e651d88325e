"""Costs that are measured: from the files of a network at many policies.

The latency that a layer adds at a choice is found by least squares over the files of random
policies: there a runtime fuses the layer with its neighbours. Alone in a file it would also pay for
the way in and out of integers.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdq import deploy, models, provenance
from kdq.config import Search
from kdq.deploy.formats.catalog import Source
from kdq.deploy.measure import latency
from kdq.quantize import MSE, Network, Weights, as_network
from kdq.quantize.layers import FLOAT_BITS, list_layers
from kdq.search import bank as banks
from kdq.search.bank import Bank, Choices
from kdq.search.cost import CostTable, Metric, counted
from kdq.search.problem import InfeasibleError, Problem
from kdq.search.run import Evaluation
from kdq.types import QParams, Variables

Bar = Callable[[Iterable[Any], str], Iterable[Any]]
Measured = dict[str, float]
MEASURED = ("size", "latency")
# As long as the metadata of an arm's own file.
METADATA = {"arm": "x" * 32, "seed": 0, "bits": "x" * 16, "arm_digest": "x" * 16, "data": "x" * 80}


def build(
    model_config: Mapping[str, Any],
    images: np.ndarray,
    choices: Choices,
    metrics: Sequence[str],
    *,
    runtime: str = "onnx",
    batch: int = 1,
    threads: int = 1,
    progress: Bar = lambda items, description: items,
) -> CostTable:
    """Returns the cost table of a network, which need not be trained.

    Args:
      model_config: the module's name and fields, as `kdq.models.build` takes them.
      images: [examples, ...] as the model takes them; a few hundred.
      choices: of every layer; `""` leaves one in float.
      metrics: some of `MEASURED`, beside the counted ones.
      runtime: in which latencies are measured, a key of `kdq.deploy.FORMATS`.
      batch: examples at once.
      threads: of the runtime.
      progress: a bar for each of the longer parts.
    """
    network = as_network(models.build(**model_config))
    variables = network.init(jax.random.key(0), images[:1])
    layers = list_layers(network, variables, images[:1])
    table = counted(layers, choices, models.count_parameters(variables))
    bank = banks.fill(network, variables, choices, [images], MSE(), progress=progress)
    files = Files(network, variables, choices, bank, images, model_config)
    conditions: dict[str, Any] = {}
    if "size" in metrics:
        # The bytes that a file has more or less with one layer changed: bytes add up.
        base = {path: bits[-1] for path, bits in choices.items()}
        whole = files.size(base)
        table["size"] = Metric(
            constant=float(whole),
            layers={
                path: {bits: float(files.size({**base, path: bits}) - whole) for bits in layer}
                for path, layer in choices.items()
            },
        )
    if "latency" in metrics:
        cores = latency.cores(threads)
        time = functools.partial(
            files.seconds, runtime=runtime, batch=batch, cores=cores, progress=progress
        )
        table["latency"], error = _latencies(choices, time)
        conditions = {
            **latency.conditions(cores),
            "runtime": runtime,
            "batch": batch,
            # The largest relative error, of random policies that the table was not made from.
            "prediction_error": error,
        }
    return CostTable(
        model=dict(model_config),
        image_shape=images.shape[1:],
        metrics=table,
        conditions=conditions,
        versions=provenance.versions(),
    )


HELD_OUT = 5  # policies on which a table of latencies is tried


def _latencies(choices: Choices, time: Callable[..., list[np.ndarray]]) -> tuple[Metric, float]:
    """Returns a table [ms], and its largest relative error on policies it was not made from."""
    rng = np.random.default_rng(0)
    unknown = 1 + sum(len(layer) - 1 for layer in choices.values())
    policies = [
        {path: layer[rng.integers(len(layer))] for path, layer in choices.items()}
        for _ in range(HELD_OUT + 2 * unknown)
    ]
    # And all layers alike, at each choice.
    for bits in dict.fromkeys(bits for layer in choices.values() for bits in layer):
        policies.append({p: bits if bits in layer else layer[-1] for p, layer in choices.items()})
    medians = np.array([1e3 * np.median(seconds) for seconds in time(policies)])
    metric = fit_additive(choices, policies[HELD_OUT:], medians[HELD_OUT:])
    table = CostTable(model={}, image_shape=(), metrics={"latency": metric})
    predicted = np.array([table.total("latency", policy) for policy in policies[:HELD_OUT]])
    return metric, float(np.max(np.abs(predicted / medians[:HELD_OUT] - 1)))


def fit_additive(
    choices: Choices, policies: Sequence[Mapping[str, str]], values: np.ndarray
) -> Metric:
    """Returns the table whose sums are nearest to the measured costs of policies (least squares).

    Each layer's cheapest choice is at 0. Where policies leave something open, the least numbers.
    """
    # One column a choice, but for each layer's last: the constant stands for those.
    columns = [(path, bits) for path, layer in choices.items() for bits in layer[:-1]]
    design = np.array([[p[path] == bits for path, bits in columns] for p in policies], float)
    design = np.column_stack([np.ones(len(policies)), design])
    constant, *solution = np.linalg.lstsq(design, values, rcond=None)[0]
    added = dict(zip(columns, solution, strict=True))
    layers = {}
    for path, layer in choices.items():
        each = {bits: float(added.get((path, bits), 0.0)) for bits in layer}
        least = min(each.values())
        constant += least
        layers[path] = {bits: value - least for bits, value in each.items()}
    return Metric(layers=layers, constant=float(constant))


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """The files that policies of a network become."""

    network: Network
    variables: Variables
    choices: Choices
    bank: Bank
    images: np.ndarray
    model_config: Mapping[str, Any]

    def choose(self, policy: Sequence[int]) -> dict[str, str]:
        """Returns {layer path: "W4A8"} of a policy for a student and its layers."""
        layers = zip(self.choices.items(), policy[1:], strict=False)
        return {path: bits[place] for (path, bits), place in layers}

    def size(self, chosen: Mapping[str, str]) -> int:
        """Returns the bytes of the packed file."""
        with tempfile.TemporaryDirectory() as folder:
            return self._pack(chosen, Path(folder) / "model")

    def seconds(
        self,
        policies: Sequence[Mapping[str, str]],
        *,
        runtime: str,
        batch: int,
        cores: Sequence[int],
        rounds: int = 20,
        progress: Bar = lambda items, description: items,
    ) -> list[np.ndarray]:
        """Returns the times of a batch in each policy's exported file, [rounds]; in turns."""
        images = np.resize(self.images, (batch, *self.images.shape[1:]))
        form, calls = deploy.FORMATS[runtime], {}
        with tempfile.TemporaryDirectory() as folder, latency.pinned(cores):
            for i, chosen in enumerate(progress(policies, "exporting")):
                path, packed = Path(folder) / str(i), Path(folder) / "packed"
                self._pack(chosen, packed)
                integer = deploy.load_packed(packed, self.network).lower(self.images[:1])
                form.save(path, Source(packed, integer, self.images[:1], {}, {}))
                run = form.load(path, len(cores), self.network)
                calls[str(i)] = lambda run=run: run(images)
            measured = latency.seconds(calls, rounds=rounds, warmup=2, least_seconds=0.005)
        return [measured[str(i)] for i in range(len(policies))]

    def _pack(self, chosen: Mapping[str, str], path: Path) -> int:
        qparams: QParams = {}  # of the layers that are not in float
        for layer, bits in chosen.items():
            place = self.choices[layer].index(bits)
            weights, activations = (width < FLOAT_BITS for width in banks.bits_of(bits))
            quantizers = {
                name: jax.tree.map(lambda a, i=place: a[i], stack)
                for name, stack in self.bank[layer].items()
                if (weights if name == "weights" else activations)
            }
            if quantizers:
                qparams[layer] = quantizers
        return deploy.save_packed(
            path,
            Weights(variables=self.variables, qparams=qparams),
            model=dict(self.model_config),
            inputs=self.images[:1],
            metadata=METADATA,
        )


def choose_finalist(
    problem: Problem,
    evaluations: Sequence[Evaluation],
    search: Search,
    files: Sequence[Files],
    tables: Sequence[CostTable],
) -> tuple[Evaluation, Measured]:
    """Returns the best policy whose own file keeps the budgets, and the measurements of that file.

    The files of the best few policies are written and timed (`search` says how many, and where they
    run), and if none of them keeps the budgets the next few. `files` and `tables` are the
    students'.

    Raises InfeasibleError if no evaluated policy keeps the budgets when measured.
    """
    distinct = {evaluation.policy: evaluation for evaluation in evaluations}
    ranked = sorted(distinct.values(), key=lambda e: e.rank(search.objective, problem))
    nearest = ""
    for start in range(0, len(ranked), search.finalists):
        part = ranked[start : start + search.finalists]
        measured = _measure(part, problem.limits, search, files, tables)
        for finalist, values in zip(part, measured, strict=True):
            over = [metric for metric, value in values.items() if value > problem.limits[metric]]
            if not over:
                return finalist, values
            nearest = nearest or f"the best has {over[0]} {values[over[0]]:g}"
    raise InfeasibleError(
        f"none of {len(ranked)} policies keeps the budgets {dict(problem.limits)} when its file is "
        f"measured; {nearest}"
    )


def _measure(
    finalists: Sequence[Evaluation],
    limits: Mapping[str, float],
    search: Search,
    files: Sequence[Files],
    tables: Sequence[CostTable],
) -> list[Measured]:
    """Returns of each file that of "size" and "latency" which has a limit."""
    measured: list[Measured] = [{} for _ in finalists]
    for s, (table, student) in enumerate(zip(tables, files, strict=True)):
        places = [i for i, evaluation in enumerate(finalists) if evaluation.policy[0] == s]
        chosen = [student.choose(finalists[i].policy) for i in places]
        if "size" in limits:
            for i, policy in zip(places, chosen, strict=True):
                measured[i]["size"] = float(student.size(policy))
        if "latency" in limits and places:
            largest = {path: choices[-1] for path, choices in student.choices.items()}
            first, *times = student.seconds(
                [largest, *chosen],
                runtime=search.runtime,
                batch=search.batch,
                cores=latency.cores(search.threads),
            )
            # As fast as the machine was when the table was made, by what the largest takes now.
            unit = table.total("latency", largest) / np.median(first)
            for i, seconds in zip(places, times, strict=True):
                measured[i]["latency"] = float(unit * np.median(seconds))
    return measured
