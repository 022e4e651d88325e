"""Cross-layer equalization: the channels of a layer get weights as large as those that take them.

What per-tensor scales lose on weights of uneven channels comes back, at no cost when the model
runs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.quantize.inputs import Inputs
from kdq.quantize.network import Network
from kdq.quantize.ptq.channels import Rescaling, input_reach, output_reach, rescale
from kdq.quantize.ptq.options import Progress, check_positive, ptq_method, quiet
from kdq.quantize.ptq.rescale import find_rescalings
from kdq.types import QParams, Variables


@ptq_method(before_calibration=True)
def equalize(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """The same function with weights of even ranges (arXiv:1906.04721).

    For each channel of a layer with `r1` the largest absolute weight that makes it, and `r2` the
    largest that takes it (over all layers that do), `s = sqrt(r1 / r2)`: the layer's weights and
    bias are divided by `s`, the others multiplied, and both ranges become sqrt(r1 r2). Layers in a
    row disturb one another, so it is repeated until nothing moves. A channel with a range of 0
    stays. Normalizations are no layers here: fold batch norm before.

    Args beside those of `options.ptq_method`:
      iterations: at most.
      tolerance: stop when no factor is further from 1.
      seed: of the search for channels; see `find_rescalings`.
    """
    check_positive("equalize", iterations=iterations)
    rescalings = find_rescalings(network, variables, batches[0], seed=seed, progress=progress)
    pairs = [rescaling for rescaling in rescalings if rescaling.producer.layer is not None]
    for rescaling in rescalings:
        if rescaling.producer.layer is None:
            logging.info("equalize leaves %r: a normalization", rescaling.producer.path)
    total = [np.ones(pair.producer.factors) for pair in pairs]
    current = variables
    largest = 0.0
    for _ in range(iterations):
        largest = 0.0
        for pair, product in zip(pairs, total, strict=True):
            factors = _factors(current, pair)
            current = rescale(current, pair, 1 / factors)
            product *= factors
            largest = max(largest, float(np.abs(factors - 1).max()))
        if largest <= tolerance:
            break
    else:
        logging.warning("equalize: factors still move by %.1e after %d", largest, iterations)
    # All at once from the weights as they were: products of many factors would gather rounding.
    for pair, product in zip(pairs, total, strict=True):
        variables = rescale(variables, pair, 1 / product)
    return jax.tree.map(jnp.asarray, variables), qparams


def _factors(variables: Variables, pair: Rescaling) -> np.ndarray:
    """The s of each channel: [producer.factors]."""
    made = output_reach(variables, pair.producer)
    taken = pair.largest([input_reach(variables, consumer) for consumer in pair.consumers])
    used = (made > 0) & (taken > 0)
    return np.sqrt(np.where(used, made, 1) / np.where(used, taken, 1))
