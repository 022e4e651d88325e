"""BRECQ: rounding learned block by block (arXiv:2102.05426), with QDrop (arXiv:2203.05740)."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.entropy import kl
from kdq.quantize import calls
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs
from kdq.quantize.masks import counted
from kdq.quantize.network import Network, Weights
from kdq.quantize.ptq.adaround import choose_layers
from kdq.quantize.ptq.options import Progress, check_logits, ptq_method, quiet
from kdq.quantize.ptq.reconstruct import Settings, reconstruct, run_quantized
from kdq.quantize.ptq.units import UNSEEN, Unit, Watch, describe, prefixes, run_watched, why_not
from kdq.quantize.simulate import put_weights, weights_of
from kdq.quantize.ste import fake_quantize
from kdq.quantize.walk import EXTRAS, place
from kdq.types import Array, QParams, Variables


@ptq_method()
def brecq(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    target: Variables | None = None,
    blocks: Sequence[str] | None = None,
    drop: float = 0.0,
    fisher: bool = False,
    steps: int = 1000,
    learning_rate: float = 0.1,
    scale_learning_rate: float = 1e-3,
    batch_size: int = 32,
    regularization: float = 10.0,
    seed: int = 0,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """Weights rounded, and scales of activations moved, so that whole blocks return what they did.

    As `adaround`, of which this has the objective, but all layers of a block are learned at once
    from the block's output. The logarithms of its activations' scales are learned along.

    Args beside those of `options.ptq_method`:
      blocks: patterns; modules whose whole path matches one are blocks ("" is the whole model).
        None: the smallest modules, but not the model itself, with two or more quantized layers.
        Layers in no block are blocks of their own.
      drop: QDrop: while it learns, each element of an activation (and of the block's input) has its
        float value with this probability, from 0 to below 1. The paper's is 0.5.
      fisher: weight the squared error by the squared gradient, at the block's output, of
        KL(float ‖ quantized), the weights of later blocks being float; False: by 1. The mean
        weight is 1.
      steps: of Adam, a block.
      learning_rate: of the rounding variables.
      scale_learning_rate: of the log scales of activations; 0 leaves them.
      batch_size: rows of a block's input in a step.
      regularization: how strongly the rounding is made to decide.
      seed: of the choice of rows and of what is dropped.

    Raises:
      ValueError: a pattern that matches no module, or blocks inside of blocks.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"brecq: drop={drop!r}: expected at least 0 and less than 1")
    settings = Settings(
        method="brecq",
        steps=steps,
        learning_rate=learning_rate,
        scale_learning_rate=scale_learning_rate,
        batch_size=batch_size,
        regularization=regularization,
        seed=seed,
        drop=drop,
    )
    paths = dict.fromkeys(p for path in qparams for p in prefixes(path))
    units = describe(network, variables, batches[0], paths, qparams)
    block_paths = smallest(list(qparams)) if blocks is None else matching(blocks, list(paths))
    units = _choose(block_paths, units, qparams)
    watch = Watch(network, tuple(unit.path for unit in units), batches)
    return reconstruct(
        watch,
        variables,
        qparams,
        target,
        units,
        settings,
        runner=dropping if drop else run_quantized,
        importance=partial(_importance, watch, target or variables, units) if fisher else None,
        progress=progress,
    )


def smallest(layers: Sequence[str]) -> list[str]:
    """The innermost modules, but not the model, around two or more of these layer paths."""
    count: dict[str, int] = {}
    for path in layers:
        for prefix in prefixes(path)[1:-1]:
            count[prefix] = count.get(prefix, 0) + 1
    several = [path for path, n in count.items() if n > 1]
    return [p for p in several if not any(other.startswith(p + "/") for other in several)]


def matching(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The paths that match. Raises ValueError for a pattern of none, and for nested matches."""
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(
                f"brecq: blocks pattern {pattern!r} matches no module with a quantized layer; "
                f"these are {list(paths)}"
            )
    matched = [path for path in paths if any(re.fullmatch(p, path) for p in patterns)]
    for path in matched:
        for outer in prefixes(path)[:-1]:
            if outer in matched:
                raise ValueError(f"brecq: block {path!r} is inside of block {outer!r}")
    return matched


def _choose(block_paths: Sequence[str], units: dict[str, Unit], qparams: QParams) -> list[Unit]:
    """The blocks that can be run alone, and the layers outside of these; in order."""
    chosen = []
    for path in block_paths:
        reason = why_not(units[path]) if path in units else "the model does not call it"
        if reason:
            logging.warning("brecq: the layers of block %r are learned alone: %s", path, reason)
        elif not any("weights" in qparams[units[path].full(p)] for p in units[path].layers):
            logging.info("brecq: block %r has no quantized weights", path)
        else:
            chosen.append(units[path])
    inside = {unit.full(layer) for unit in chosen for layer in unit.layers}
    rest = [path for path, q in qparams.items() if "weights" in q and path not in inside]
    chosen += choose_layers("brecq", rest, units)
    return sorted(chosen, key=list(units.values()).index)


def dropping(
    module: nn.Module,
    variables: Variables,
    qparams: QParams,
    args: tuple,
    key: Array,
    drop: Array,
    /,
    **kwargs: Any,
) -> Any:
    """The runner in which each element of an input stays float with probability `drop`.

    The keys travel as the quantizers do: each layer of a stack has its own.
    """
    extras = {}
    for i, (path, quantizers) in enumerate(qparams.items()):
        stack = jnp.shape(next(iter(quantizers.values())).qmin)
        keys = jax.random.split(jax.random.fold_in(key, i), stack)
        extras[path] = quantizers, jax.random.key_data(keys)

    def drop_some(call: ModuleCall) -> Any:
        operands = call.operands
        if not operands or not call.module.has_variable("params", EXTRAS):
            return call.run()
        quantizers, key_data = call.module.get_variable("params", EXTRAS)
        key, values = jax.random.wrap_key_data(key_data), {}
        for i, name in enumerate(name for name in operands if name in quantizers):
            x = operands[name]
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), drop, x.shape)
            values[name] = jnp.where(kept, x, fake_quantize(x, quantizers[name]))
        return call.with_operands(**values).run()

    return calls.run(module, place(variables, extras), Inputs(*args, **kwargs), drop_some)[0]


def _importance(
    watch: Watch,
    target: Variables,
    units: Sequence[Unit],
    variables: Variables,
    qparams: QParams,
    unit: Unit,
    index: tuple[int, ...],
) -> list[list[Array]]:
    """The squared gradients of KL at a unit's outputs, mean 1; see `reconstruct`."""
    # Weights of units already done are rounded in `variables`, those of later ones are float.
    inputs = {p: {k: q for k, q in of.items() if k != "weights"} for p, of in qparams.items()}
    weighted = {p: qparams[p] for p in map(unit.full, unit.layers) if "weights" in qparams[p]}
    floats = weights_of(variables["params"], weighted)
    nearest = {p: fake_quantize(w, weighted[p]["weights"]) for p, w in floats.items()}
    mixed = {p: jnp.asarray(w).at[index].set(nearest[p][index]) for p, w in floats.items()}
    weights = Weights(
        variables={**variables, "params": put_weights(variables["params"], mixed)},
        qparams={path: quantizers for path, quantizers in inputs.items() if quantizers},
    )
    calls_of = tuple((u.path, u.calls) for u in units)
    parts = []
    for batch in watch.batches:
        gradients = _gradients(target, weights, batch, network=watch.network, units=calls_of)
        square = lambda g: g[index].astype(jnp.float32) ** 2
        parts.append(jax.tree.map(square, gradients[unit.path]))
    joined = jax.tree.map(lambda *g: jnp.concatenate(g), *parts)
    calls_joined = [joined[str(i)] for i in range(len(unit.calls))]
    return [_mean_1(squares, watch.counted(squares)) for squares in calls_joined]


def _mean_1(weights: list[Array], counts: list[Array] | None) -> list[Array]:
    sizes = [w.size for w in weights]
    if counts is not None:
        sizes = [jnp.broadcast_to(c, w.shape).sum() for w, c in zip(weights, counts, strict=True)]
        weights = [jnp.where(c, w, 0) for w, c in zip(weights, counts, strict=True)]
    mean = sum(w.sum() for w in weights) / sum(sizes)
    if not np.isfinite(mean):
        raise ValueError("brecq: the gradients of KL are not finite")
    return [jnp.where(mean > 0, w / mean, 1.0) for w in weights]


@partial(jax.jit, static_argnames=("network", "units"))
def _gradients(target, weights, inputs, *, network, units):
    """By unit and call: the gradient of Σ KL(float ‖ quantized) at its float outputs."""
    reference = network.select_prediction(
        network.run(Weights(variables=target, qparams={}), inputs)[0]
    )
    check_logits("brecq: fisher=True", "the model's outputs", reference)
    calls_of = dict(units)
    go = partial(run_watched, network, weights, inputs)
    _, shapes = jax.eval_shape(lambda: go(dict.fromkeys(calls_of, UNSEEN)))
    zeros = {
        path: {
            str(i): [
                jnp.zeros(a.shape, a.dtype)
                for a, kept in zip(shapes[path].seen[str(i)][1], call.outputs, strict=True)
                if kept
            ]
            for i, call in enumerate(unit_calls)
        }
        for path, unit_calls in calls_of.items()
    }

    def divergence(nudges: Any) -> Array:
        outputs, _ = go({path: UNSEEN._replace(nudges=n) for path, n in nudges.items()})
        counts = counted(inputs.mask, reference)
        where = None if counts is None else counts.reshape(counts.shape[:-1])
        return kl(reference, network.select_prediction(outputs)).sum(where=where)

    return jax.grad(divergence)(zeros)
