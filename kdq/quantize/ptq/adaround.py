"""AdaRound: each layer's rounding, learned so that its output moves least (arXiv:2004.10568)."""

from collections.abc import Iterable, Sequence

import flax.linen as nn
from absl import logging

from kdq.quantize.inputs import Batch, reboxed, unboxed
from kdq.quantize.network import Network, as_network
from kdq.quantize.ptq.options import Progress, as_list, check_positive, quiet
from kdq.quantize.ptq.order import prefixes, stack_roots
from kdq.quantize.ptq.reconstruct import Settings, reconstruct
from kdq.quantize.ptq.units import Unit, Watch, describe, why_not
from kdq.types import QParams, Variables


def adaround(
    network: Network | nn.Module,
    variables: Variables,
    qparams: QParams,
    batches: Iterable[Batch],
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
    whose learned rounding does not have the smaller error on the batches is rounded to nearest.

    The activation function after a layer, which the paper includes, is not seen here; `brecq` does.

    Args:
      network: any Linen module, or a `Network`.
      variables: its variables, with float weights.
      qparams: from `calibrate`; layers without quantized weights stay as they are.
      batches: unlabelled inputs of the model, of one shape; arrays or tuples of arguments.
      target: the float model's, where `variables` have been changed since; None: `variables`.
      steps: of Adam, a layer.
      learning_rate: of V.
      batch_size: rows of a layer's input in a step.
      regularization: how strongly V is made to decide.
      seed: of the choice of rows.
      progress: (items, description) -> items.

    Returns:
      variables whose quantized weights are on their grids, and `qparams`. Embeddings that are only
      looked up are rounded to nearest, which is their best.

    Raises:
      ValueError: no batches, an option out of range, values that are not finite (names the layer).
    """
    batches = as_list(batches, "adaround")
    network, boxed, variables = as_network(network), variables, unboxed(variables)
    check_positive("adaround", steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    settings = Settings(
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        regularization=regularization,
        seed=seed,
    )
    target = variables if target is None else unboxed(target)
    weighted = [path for path, own in qparams.items() if "weights" in own]
    paths = dict.fromkeys(p for path in weighted for p in prefixes(path))
    units = describe(network, variables, batches[0], paths, qparams)
    chosen = alone("adaround", weighted, units)
    variables, qparams = reconstruct(
        Watch(network, tuple(u.path for u in chosen), batches),
        variables,
        qparams,
        target,
        chosen,
        stack_roots(network, variables, batches[0]),
        settings,
        name="adaround",
        progress=progress,
    )
    return reboxed(variables, boxed), qparams


def alone(name: str, paths: Sequence[str], units: dict[str, Unit]) -> list[Unit]:
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
            logging.info("%s: %r is rounded to nearest: %s", name, path, reason)
        else:
            chosen.append(unit)
    return sorted(chosen, key=list(units.values()).index)
