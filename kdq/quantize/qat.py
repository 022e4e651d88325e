"""Methods of quantization-aware training: what of a quantizer trains, and by which gradient.

A method changes how quantizers behave under differentiation (`Training`), never what a finished
model is made of: `finish` returns plain quantizers, which is all that a packed file knows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kdq.fields import unknown
from kdq.quantize.grid import Quantizer, Training, expand, over_stack, to_groups
from kdq.quantize.inputs import reboxed, unboxed
from kdq.quantize.kinds import weight_name
from kdq.quantize.paths import copied
from kdq.quantize.scales import map_quantizers
from kdq.quantize.ste import transformed
from kdq.types import QParams, Variables

FIXED = Training(trains=())
BY_CHANCE = Training(trains=(), stochastic=True)
LEARNED = Training()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The training of quantizers of weights and of activations."""

    weights: Training
    activations: Training
    scale_format: str = ""  # of every scale: a key of formats.ROUNDINGS


METHODS: dict[str, Method] = {
    # Straight-through estimation with the clip mask (arXiv:1308.3432); ranges as calibrated.
    "ste": Method(weights=FIXED, activations=FIXED),
    # Learned step size (arXiv:1902.08153), with its gradient scale.
    "lsq": Method(weights=Training(gradient_scale=True), activations=Training(gradient_scale=True)),
    # The same, and the offset of the activations (arXiv:2004.09576).
    "lsq_plus": Method(
        weights=Training(gradient_scale=True),
        activations=Training(gradient_scale=True, trains=("scale", "zero_point")),
    ),
    # Weights by a tanh onto a fixed range, activations clipped at a fixed one (arXiv:1606.06160).
    # The paper's range is ±1; here it is that of the weights, which a network without batch norm
    # needs, and calibration's for activations.
    "dorefa": Method(weights=Training(trains=(), transform="tanh"), activations=FIXED),
    # Activations clipped where a trained bound says, whose gradient is of what it clips and which
    # is decayed (arXiv:1805.06085); weights as DoReFa.
    "pact": Method(
        weights=Training(trains=(), transform="tanh"),
        activations=Training(scale_gradient="clipped", decay=2e-4),
    ),
    # Thresholds trained in the log domain, scales rounded to powers of two (arXiv:1903.08066).
    "tqt": Method(weights=LEARNED, activations=LEARNED, scale_format="power_of_two"),
    # Each gradient scaled by its element's own rounding error (arXiv:2104.00903).
    "ewgs": Method(weights=Training(elementwise=1e-3), activations=Training(elementwise=1e-3)),
    # Rounded up or down by chance, without bias (arXiv:1502.02551); ranges as calibrated.
    "stochastic": Method(weights=BY_CHANCE, activations=BY_CHANCE),
}


def prepare(variables: Variables, qparams: QParams, method: str) -> tuple[Variables, QParams]:
    """A calibrated model, set up to train by a method; `finish` is the way back.

    Args:
      variables: of the model.
      qparams: plain quantizers.
      method: a key of `METHODS`.

    Returns:
      Variables of which only weights that the method transforms have changed, so that what is
      rounded is the same as before, and the quantizers.

    Raises:
      ValueError: an unknown method, or one that a quantizer does not go with; names the layer.
    """
    if method not in METHODS:
        raise ValueError(unknown("method of quantization-aware training:", method, METHODS))
    how, boxed, variables = METHODS[method], variables, unboxed(variables)
    prepared: dict[str, dict[str, Quantizer]] = {}
    params = dict(variables.get("params", {}))
    for path, quantizers in qparams.items():
        prepared[path] = {}
        for name, quantizer in quantizers.items():
            training = how.weights if name == "weights" else how.activations
            _check(quantizer, training, how, f"{method!r} at {path}/{name}")
            if training.transform:
                layer = copied(params, path, "qparams")
                weight = weight_name(layer)
                layer[weight], quantizer = over_stack(_before_tanh, quantizer)(
                    layer[weight], quantizer
                )
            scale_format = how.scale_format or quantizer.scale_format
            prepared[path][name] = quantizer.replace(training=training, scale_format=scale_format)
    changed = {**variables, "params": params} if params else variables
    return reboxed(changed, boxed), prepared


def _check(quantizer: Quantizer, training: Training, how: Method, where: str) -> None:
    if quantizer.levels is not None and (training.transform or "zero_point" in training.trains):
        raise ValueError(f"{where}: only grids of integers, not a number format")
    if quantizer.scale_format and how.scale_format:
        raise ValueError(f"{where}: its scales already are {quantizer.scale_format!r}")


def finish(variables: Variables, qparams: QParams) -> tuple[Variables, QParams]:
    """Plain quantizers, and the weights they round, with the same outputs."""
    boxed, variables = variables, unboxed(variables)
    params = dict(variables["params"])
    for path, quantizers in qparams.items():
        if "weights" in quantizers and quantizers["weights"].training.transform:
            layer = copied(params, path, "qparams")
            name = weight_name(layer)
            change = over_stack(transformed, quantizers["weights"])
            layer[name] = change(layer[name], quantizers["weights"])
    return reboxed({**variables, "params": params}, boxed), plain(qparams)


def plain(qparams: QParams) -> QParams:
    """The quantizers without what they train by; they round to the nearest."""
    return map_quantizers(
        lambda _, quantizer: quantizer.replace(training=LEARNED, key=None), qparams
    )


def with_keys(qparams: QParams, key: jax.Array) -> QParams:
    """`qparams` with a key of its own for each quantizer that is `stochastic`, as of one step.

    Each of a stack of layers has its own too. Where one quantizer meets several tensors, as of a
    layer that is called twice, it draws the same numbers for tensors of the same shape.

    Args:
      qparams: as `prepare` set them up.
      key: random, of this step.
    """
    names = sorted((p, name) for p, quantizers in qparams.items() for name in quantizers)
    number = {name: i for i, name in enumerate(names)}

    def draw(key_of_tensor: tuple[str, str], quantizer: Quantizer) -> Quantizer:
        if not quantizer.training.stochastic:
            return quantizer
        tensor_key = jax.random.fold_in(key, number[key_of_tensor])
        return quantizer.replace(key=jax.random.split(tensor_key, jnp.shape(quantizer.qmin)))

    return map_quantizers(draw, qparams)


def widened(qparams: QParams, bits: jax.Array | float) -> QParams:
    """Quantizers of at least so many bits over the same ranges; `bits` may be traced.

    A whole number of new codes for each old one, so that the codes of an integer grid stay whole:
    of 2 bits and `bits=4`, 5 times as many steps from end to end. Number formats stay as they are.
    With 16 a network trains almost as in float, but within the ranges.
    """

    def widen(_: tuple[str, str], quantizer: Quantizer) -> Quantizer:
        if quantizer.levels is not None:
            return quantizer
        factor = (jnp.exp2(jnp.asarray(bits, jnp.float32)) - 1) / (quantizer.qmax - quantizer.qmin)
        factor = jnp.maximum(1.0, jnp.round(factor))
        of_scale = factor.reshape(
            *factor.shape, *[1] * (jnp.ndim(quantizer.scale) - jnp.ndim(factor))
        )
        return quantizer.replace(
            scale=quantizer.scale / of_scale,
            zero_point=quantizer.zero_point * of_scale,
            qmin=quantizer.qmin * factor,
            qmax=quantizer.qmax * factor,
        )

    return map_quantizers(widen, qparams)


def _before_tanh(weight: jax.Array, quantizer: Quantizer) -> tuple[jax.Array, Quantizer]:
    """The weight of which `ste.transformed` makes `weight`, and the quantizer that it is for.

    Its codes are spread evenly over ± the largest weight of those that share a scale, none of them
    at 0 (arXiv:1606.06160, equation 9, which has one range for the whole tensor).
    """
    steps, shape = quantizer.qmax - quantizer.qmin, quantizer.scale.shape
    reach = to_groups(jnp.abs(weight), shape).max(-1).reshape(shape).astype(jnp.float32)
    reach = jnp.where(reach > 0, reach, steps / 2)  # of zeros: a scale of 1
    # How much of the tanh is used is free: what it is divided by makes up for it. Up to 1 the
    # weights stay about what they are; large ones would end where it is flat.
    used = jnp.tanh(jnp.minimum(reach, 1.0))
    moved = jnp.arctanh(weight * expand(used / reach, weight.shape)).astype(weight.dtype)
    return moved, quantizer.replace(
        scale=2 * reach / steps,
        zero_point=jnp.broadcast_to(steps / 2, shape),
        qmin=jnp.zeros_like(steps),
        qmax=steps,
    )
