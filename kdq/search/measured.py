"""Cost tables that are measured: from the files of a network at many policies.

The latency that a layer adds at a choice is found by least squares over the files of random
policies: there a runtime fuses the layer with its neighbours. Alone in a file it would also pay for
the way in and out of integers.
"""

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdq import deploy, models, provenance
from kdq.deploy.export import Source
from kdq.deploy.measure import latency
from kdq.quantize import MSE, Network, as_network
from kdq.quantize.layers import FLOAT_BITS, list_layers
from kdq.search import bank as banks
from kdq.search.bank import Bank, Choices
from kdq.search.cost import CostTable, Metric, counted
from kdq.types import QParams, Variables

Bar = Callable[[Iterable[Any], str], Iterable[Any]]
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
        table["size"] = _sizes(choices, files)
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


def _sizes(choices: Choices, files: "Files") -> Metric:
    """Returns the bytes that a file has more or less with one layer changed: bytes add up."""
    base = {path: bits[-1] for path, bits in choices.items()}
    whole = files.size(base)
    return Metric(
        constant=float(whole),
        layers={
            path: {bits: float(files.size({**base, path: bits}) - whole) for bits in layer}
            for path, layer in choices.items()
        },
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


class Files:
    """The files that policies of a network become."""

    def __init__(
        self,
        network: Network,
        variables: Variables,
        choices: Choices,
        bank: Bank,
        images: np.ndarray,
        model_config: Mapping[str, Any],
    ):
        self._network, self._variables, self.choices = network, variables, choices
        self._bank, self._images, self._config = bank, images, dict(model_config)

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
        images = np.resize(self._images, (batch, *self._images.shape[1:]))
        form, calls = deploy.FORMATS[runtime], {}
        with tempfile.TemporaryDirectory() as folder, latency.pinned(cores):
            for i, chosen in enumerate(progress(policies, "exporting")):
                path, packed = Path(folder) / str(i), Path(folder) / "packed"
                self._pack(chosen, packed)
                integer = deploy.load_packed(packed, self._network.module).lower(self._images[:1])
                form.save(path, Source(packed, integer, self._images[:1], {}, {}))
                run = form.load(path, len(cores), self._network.module)
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

    def _qparams(self, chosen: Mapping[str, str]) -> QParams:
        """Returns the quantizers of the layers that are not in float."""
        qparams = {}
        for path, bits in chosen.items():
            place = self.choices[path].index(bits)
            weights, activations = (width < FLOAT_BITS for width in banks.bits_of(bits))
            layer = {
                name: jax.tree.map(lambda a, i=place: a[i], quantizers)
                for name, quantizers in self._bank[path].items()
                if (weights if name == "weights" else activations)
            }
            if layer:
                qparams[path] = layer
        return qparams
