"""Batch-norm statistics of the quantized model."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs
from kdq.quantize.masks import counted
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import copied
from kdq.quantize.ptq.norms import is_folded, list_norms
from kdq.quantize.ptq.options import Progress, ptq_method, quiet
from kdq.quantize.walk import walk
from kdq.types import QParams, Variables


@ptq_method()
def reestimate(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """Replaces the statistics of every batch norm by those of `batches`, quantizers at work.

    The mean and the (biased) variance over all examples and positions of all batches, each counted
    once: no momentum (arXiv:2105.07576, §3). While a batch runs, each norm normalizes by that
    batch's own statistics, so that later norms see what the new statistics make of it: exactly
    for one batch, nearly for several. All else (dropout) runs as the network says.

    A norm that was folded stays folded, with a log line.

    Arguments, returns and errors: see `options.ptq_method`.
    """
    norms = list_norms(network, variables, batches[0])
    folded = tuple(path for path, norm in norms.items() if is_folded(norm, variables))
    for path in folded:
        logging.info("reestimate: %r has been folded into a layer, and stays as it is", path)
    paths = tuple(path for path in norms if path not in folded)
    if not paths:
        logging.warning("reestimate: the model has no batch norm that could be re-estimated")
        return variables, qparams
    seen: dict[str, list] = {path: [] for path in paths}
    for inputs in progress(batches, "re-estimating batch norms"):
        weights = Weights(variables=variables, qparams=qparams)
        moments = _moments(weights, inputs, network=network, paths=paths)
        for path in paths:
            seen[path] += [[np.asarray(v, np.float64) for v in call] for call in moments[path]]
    stats = dict(variables["batch_stats"])
    for path, calls in seen.items():
        arrays = copied(stats, path, "batch norms")
        for name, value in zip(("mean", "var"), _pooled(calls), strict=True):
            if not np.isfinite(value).all():
                raise ValueError(f"reestimate met NaN or infinity in the input of norm {path!r}")
            arrays[name] = jnp.asarray(value, arrays[name].dtype)
    return {**variables, "batch_stats": stats}, qparams


def _pooled(calls: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all, from `(elements, mean, variance)` of each call; float64."""
    weights, means, variances = (np.stack(part) for part in zip(*calls, strict=True))
    weights = weights.reshape(*weights.shape, *[1] * (means.ndim - weights.ndim))
    weights = weights / weights.sum(0)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + np.square(means - mean))).sum(0)


@partial(jax.jit, static_argnames=("network", "paths"))
def _moments(weights, inputs, *, network, paths):
    """{path: a tuple of `(elements, mean, variance)`, one a call} for one batch."""

    def watch(call: ModuleCall, moments: Any) -> tuple[Any, Any]:
        module = call.module
        if call.path not in paths or call.method != "__call__":
            return call.run(), moments
        # A bound module belongs to this one call of the model: nothing outlives it. Momentum 0
        # leaves the batch's own statistics in place of the running ones.
        for field, value in (
            ("use_running_average", False),
            ("momentum", 0.0),
            ("axis_name", None),
            ("use_fast_variance", False),
        ):
            object.__setattr__(module, field, value)
        x, mask = call.argument(0, "x"), call.kwargs.get("mask")
        counts = counted(inputs.mask, x)
        if counts is not None:
            mask = counts if mask is None else counts & jnp.asarray(mask, bool)
        kwargs = {k: v for k, v in call.kwargs.items() if k != "use_running_average"}
        kwargs |= {} if mask is None else {"mask": mask}
        outputs = dataclasses.replace(call, args=call.args[:1], kwargs=kwargs).run()
        mean, var = (module.get_variable("batch_stats", name) for name in ("mean", "var"))
        elements = x.size if mask is None else jnp.broadcast_to(mask, x.shape).sum()
        return outputs, (*moments, (jnp.asarray(elements / mean.size, jnp.float32), mean, var))

    extras = dict.fromkeys(paths, ())
    return walk(network, weights, inputs, watch, extras, collection="batch_stats")[1]
