"""AdaRound: each layer's rounding, learned so that its output moves least (arXiv:2004.10568)."""

from collections.abc import Sequence

import flax.linen as nn
from absl import logging

from kdq.quantize.inputs import Inputs
from kdq.quantize.network import Network
from kdq.quantize.ptq.options import Progress, ptq_method, quiet
from kdq.quantize.ptq.reconstruct import Settings, reconstruct
from kdq.quantize.ptq.units import Unit, Watch, describe, prefixes, why_not
from kdq.types import QParams, Variables


@ptq_method()
def adaround(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    target: Variables | None = None,
    steps: int = 1000,
    learning_rate: float = 0.1,
    batch_size: int = 32,
    regularization: float = 10.0,
    seed: int = 0,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """Weights rounded up or down, layer by layer, whichever serves the layer's output.

    Of each layer f, in the order in which they run, V minimises by Adam

        E |f(W, x) - f(soft(V), x̂)|² / E |f(W, x) - f(nearest(W), x̂)|²
            + regularization · mean(1 - |2 h(V) - 1|^β),

    where x is the input in the float model, x̂ that in the model whose earlier layers are quantized
    already and h(V) from 0 to 1 stands between rounding down and up (see `rounding`). The paper's
    error is not divided and its second term is a sum, times 0.01: here neither the size of the
    outputs nor the number of weights matters to `regularization`. β falls from 20 to 2. A layer
    whose learned rounding does not have the smaller error on the batches is rounded to nearest, as
    are embeddings that are only looked up.

    The activation function after a layer, which the paper includes, is not seen here; `brecq` does.

    Args beside those of `options.ptq_method`:
      steps: of Adam, a layer.
      learning_rate: of V.
      batch_size: rows of a layer's input in a step.
      regularization: how strongly V is made to decide.
      seed: of the choice of rows.
    """
    settings = Settings(
        method="adaround",
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        regularization=regularization,
        seed=seed,
    )
    weighted = [path for path, quantizers in qparams.items() if "weights" in quantizers]
    paths = dict.fromkeys(p for path in weighted for p in prefixes(path))
    units = describe(network, variables, batches[0], paths, qparams)
    units = choose_layers("adaround", weighted, units)
    watch = Watch(network, tuple(unit.path for unit in units), batches)
    return reconstruct(watch, variables, qparams, target, units, settings, progress=progress)


def choose_layers(method: str, paths: Sequence[str], units: dict[str, Unit]) -> list[Unit]:
    """The units of the layers whose rounding can be learned alone; logs why not of the others."""
    chosen = []
    for path in paths:
        unit = units.get(path)
        if unit is None:
            reason = "it is in a loop over one set of weights, or not called on these inputs"
        elif isinstance(unit.module, nn.Embed) and {c.method for c in unit.calls} == {"__call__"}:
            reason = "a lookup's error is its weights'"
        else:
            reason = why_not(unit)
        if reason:
            logging.info("%s: %r is rounded to nearest: %s", method, path, reason)
        else:
            chosen.append(unit)
    return sorted(chosen, key=list(units.values()).index)
