"""Cost tables of what can only be measured: the files of a network at many policies.

What a layer adds to a latency at a choice is found by least squares over the files of random
policies: so it is what a runtime makes of the layer among its neighbours, fused with them and fed
by them. Alone in a file it would also pay for the way in and out of integers.
"""

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import deploy, models, provenance
from kdq.deploy.export import Source
from kdq.deploy.measure import latency
from kdq.quantize import MSE
from kdq.quantize.layers import FLOAT_BITS, list_layers
from kdq.quantize.network import as_network
from kdq.search import bank as banks
from kdq.search.bank import Bank, Choices
from kdq.search.cost import CostTable, Metric, counted
from kdq.types import QParams, Variables

Bar = Callable[[Iterable[Any], str], Iterable[Any]]
MEASURED = ("size", "latency")
# As long as what an arm's own file says of itself.
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
    """The cost table of a network, which need not be trained.

    Args:
      model_config: the module's name and fields, as `kdq.models.build` takes them.
      images: [examples, ...] as the model takes them; a few hundred.
      choices: of every layer; `""` leaves one in float.
      metrics: what is wanted beside what is counted: some of `MEASURED`.
      runtime: in which latencies are measured, a key of `kdq.deploy.FORMATS`.
      batch: examples at once.
      threads: of the runtime.
      progress: a bar for each of the longer parts.
    """
    model = models.build(**model_config)
    variables = as_network(model).init(jax.random.key(0), images[:1])
    layers = list_layers(model, variables, images[:1])
    found = counted(layers, choices, models.count_parameters(variables))
    bank = banks.fill(model, variables, choices, [images], MSE(), progress=progress)
    files = Files(model, variables, choices, bank, images, model_config)
    conditions: dict[str, Any] = {}
    if "size" in metrics:
        found["size"] = _sizes(choices, files)
    if "latency" in metrics:
        cores = latency.cores(threads)
        time = functools.partial(
            files.seconds, runtime=runtime, batch=batch, cores=cores, progress=progress
        )
        found["latency"], error = _latencies(choices, time)
        conditions = {
            **latency.conditions(cores),
            "runtime": runtime,
            "batch": batch,
            # The largest relative one, of policies by chance that the table was not made from.
            "prediction_error": error,
        }
    return CostTable(
        model=dict(model_config),
        image_shape=images.shape[1:],
        metrics=found,
        conditions=conditions,
        versions=provenance.versions(),
    )


def _sizes(choices: Choices, files: "Files") -> Metric:
    """What a file has more or less with one layer changed: bytes add up."""
    base = {path: own[-1] for path, own in choices.items()}
    whole = files.size(base)
    return Metric(
        constant=float(whole),
        layers={
            path: {bits: float(files.size({**base, path: bits}) - whole) for bits in own}
            for path, own in choices.items()
        },
    )


HELD_OUT = 5  # policies on which a table of latencies is tried


def _latencies(choices: Choices, time: Callable[..., list[np.ndarray]]) -> tuple[Metric, float]:
    """A table [ms], and its largest relative error on policies that it was not made from."""
    rng = np.random.default_rng(0)
    unknown = 1 + sum(len(own) - 1 for own in choices.values())
    by_chance = [
        {path: own[rng.integers(len(own))] for path, own in choices.items()}
        for _ in range(HELD_OUT + 2 * unknown)
    ]
    labels = dict.fromkeys(bits for own in choices.values() for bits in own)
    same = [
        {path: bits if bits in own else own[-1] for path, own in choices.items()} for bits in labels
    ]
    policies = by_chance + same
    medians = np.array([1e3 * np.median(own) for own in time(policies)])
    metric = fit_additive(choices, policies[HELD_OUT:], medians[HELD_OUT:])
    table = CostTable(model={}, image_shape=(), metrics={"latency": metric})
    predicted = np.array([table.total("latency", one) for one in policies[:HELD_OUT]])
    return metric, float(np.max(np.abs(predicted / medians[:HELD_OUT] - 1)))


def fit_additive(
    choices: Choices, policies: Sequence[Mapping[str, str]], values: np.ndarray
) -> Metric:
    """The table whose sums are nearest to what policies were measured to cost, by least squares.

    Each layer's cheapest choice is at 0. Where policies leave something open, the least numbers.
    """
    columns = [(path, bits) for path, own in choices.items() for bits in own[:-1]]
    design = np.array([[one[path] == bits for path, bits in columns] for one in policies], float)
    design = np.column_stack([np.ones(len(policies)), design])
    constant, *found = np.linalg.lstsq(design, values, rcond=None)[0]
    of = dict(zip(columns, found, strict=True))
    layers = {}
    for path, own in choices.items():
        each = {bits: float(of.get((path, bits), 0.0)) for bits in own}
        least = min(each.values())
        constant += least
        layers[path] = {bits: value - least for bits, value in each.items()}
    return Metric(layers=layers, constant=float(constant))


class Files:
    """The files that policies of a network become."""

    def __init__(
        self,
        model: nn.Module,
        variables: Variables,
        choices: Choices,
        bank: Bank,
        images: np.ndarray,
        model_config: Mapping[str, Any],
    ):
        self._model, self._variables, self.choices = model, variables, choices
        self._bank, self._images, self._config = bank, images, dict(model_config)

    def of(self, policy: Sequence[int]) -> dict[str, str]:
        """{layer path: "W4A8"} of a policy for a student and its layers."""
        layers = zip(self.choices.items(), policy[1:], strict=False)
        return {path: own[place] for (path, own), place in layers}

    def size(self, chosen: Mapping[str, str]) -> int:
        """Bytes of the packed file."""
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
        """Of a batch in each policy's exported file, [rounds]; all of them take turns."""
        images = np.resize(self._images, (batch, *self._images.shape[1:]))
        form, calls = deploy.FORMATS[runtime], {}
        with tempfile.TemporaryDirectory() as folder, latency.pinned(cores):
            for i, chosen in enumerate(progress(policies, "exporting")):
                path = Path(folder) / str(i)
                form.save(path, self._source(chosen, Path(folder) / "packed"))
                run = form.load(path, len(cores), self._model)
                calls[str(i)] = lambda run=run: run(images)
            measured = latency.seconds(calls, rounds=rounds, warmup=2, least_seconds=0.005)
        return [measured[str(i)] for i in range(len(policies))]

    def _pack(self, chosen: Mapping[str, str], path: Path) -> int:
        return deploy.save_packed(
            path,
            self._variables,
            self._qparams(chosen),
            model=self._config,
            inputs=self._images[:1],
            metadata=METADATA,
        )

    def _source(self, chosen: Mapping[str, str], path: Path) -> Source:
        self._pack(chosen, path)
        packed = deploy.load_packed(path, self._model)
        integer = packed.lower(self._images[:1])
        return Source(path, integer, self._images[:1], {}, {})

    def _qparams(self, chosen: Mapping[str, str]) -> QParams:
        """Of the layers that are not in float."""
        found = {}
        for path, bits in chosen.items():
            place = self.choices[path].index(bits)
            of = zip(("weights", "activations"), banks.bits_of(bits), strict=True)
            wanted = {name for name, width in of if width < FLOAT_BITS}
            own = {
                name: jax.tree.map(lambda a, i=place: a[i], one)
                for name, one in self._bank[path].items()
                if ("weights" if name == "weights" else "activations") in wanted
            }
            if own:
                found[path] = own
        return found
