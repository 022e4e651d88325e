"""GPTQ: each input's weights are rounded in turn, the others make up for the error."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from kdq.quantize import grid
from kdq.quantize.grid import Quantizer
from kdq.quantize.inputs import Inputs
from kdq.quantize.kinds import Unsupported
from kdq.quantize.layers import LayerInfo, list_layers
from kdq.quantize.network import Network
from kdq.quantize.observe import observe
from kdq.quantize.ptq import matrices
from kdq.quantize.ptq.options import Progress, check_positive, ptq_method, quiet
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables


@ptq_method()
def gptq(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """Weights rounded so that each layer's output moves little (arXiv:2210.17323).

    Minimises |X W - X Q|² over the grid of each weight, as `qparams` has it: scales stay. With
    `H = 2 XᵀX + λ I` and `U` the upper Cholesky factor of its inverse, input `j` is rounded, and
    `(W[j] - Q[j]) / U[j, j] · U[j, k]` taken from the weights of every later input `k`. `X` is the
    layer's own input (patches of a convolution, a Hessian for each group of one), with the layers
    before it quantized, weights and activations; the layers of a stack are rounded together, and
    see the stack's other layers in float. An input that is always 0 is rounded to nearest.

    Args beside those of `options.ptq_method`:
      damping: λ, as a part of the mean of the diagonal of 2 XᵀX.
      act_order: inputs of large energy first, instead of in their order.
      block_size: inputs between two updates of the rest; changes the time, not the result.

    Raises:
      ValueError: a Hessian that is singular at this damping; names the layer.
    """
    if not damping >= 0:
        raise ValueError(f"gptq: damping={damping!r}: expected 0 or more")
    check_positive("gptq", block_size=block_size)
    layers = list_layers(network, variables, batches[0])
    if unknown := [path for path in qparams if path not in layers]:
        raise ValueError(f"qparams have {unknown}; the layers are {list(layers)}")
    paths = [path for path in layers if "weights" in qparams.get(path, {})]
    for path in progress(paths, "gptq"):
        layer, quantizers = layers[path], qparams[path]
        earlier = list(layers)[: list(layers).index(path)]
        before = {p: qparams[p] for p in earlier if p in qparams}
        weight = jnp.asarray(matrices.weight_of(variables, layer))
        if reason := _why_not(layer):
            logging.warning("gptq rounds layer %r to nearest: %s", path, reason)
            rounded = fake_quantize(weight, quantizers["weights"])
        else:
            state = (matrices.empty_gram(layer), quantizers.get("activations"))
            key = (path, "activations")
            seen = observe(
                network,
                variables,
                before,
                {key: _Hessian(layer)},
                {key: state},
                batches,
            )
            rounded = _rounded(
                layer, weight, quantizers["weights"], seen[key][0], damping, act_order, block_size
            )
        variables = matrices.replaced(variables, path, **{layer.weight_name: rounded})
    return variables, qparams


def _why_not(layer: LayerInfo) -> str:
    if "activations" not in layer.operands:
        return "a lookup multiplies nothing"
    try:
        matrices.form(layer)
    except Unsupported as error:
        return str(error)
    return ""


@dataclasses.dataclass(frozen=True)
class _Hessian:
    """A watcher: 2 Σ p pᵀ of what the layer multiplies, its input as its quantizer leaves it."""

    layer: LayerInfo

    def __call__(
        self, state: tuple[Array, Quantizer | None], x: Array, counts: Array | None = None
    ) -> Any:
        hessian, quantizer = state
        seen = x if quantizer is None else fake_quantize(x, quantizer)
        return hessian + 2 * matrices.gram(self.layer, seen), quantizer


def _rounded(
    layer: LayerInfo,
    weight: Array,
    quantizer: Quantizer,
    hessian: Array,
    damping: float,
    act_order: bool,
    block_size: int,
) -> Array:
    """The weight of a layer, or of a stack, on its grid."""
    matrices.check_finite({layer.path: hessian}, "gptq")
    form = matrices.form(layer)

    def prepare(weight, quantizer):
        """The matrices of one layer, and its scale for each of their elements."""
        quantizer = grid.with_rounded_scale(quantizer)
        spread = lambda p: jnp.broadcast_to(grid.expand(p, weight.shape), weight.shape)
        arrays = (weight.astype(jnp.float32), *map(spread, (quantizer.scale, quantizer.zero_point)))
        return tuple(matrices.to_matrix(a, form) for a in arrays), quantizer

    flat, quantizer = matrices.over_stack(prepare, layer.stack)(weight, quantizer)
    solve = partial(_solve, act_order=act_order, block=min(block_size, form.size(form.inputs)))
    solve = jax.vmap(solve, in_axes=(0, 0, 0, None, None))  # over groups
    for _ in layer.stack:
        solve = jax.vmap(solve, in_axes=(0, 0, 0, 0, None))
    limits = quantizer.replace(scale=None, zero_point=None)
    rounded = solve(hessian, flat[0], flat[1:], limits, jnp.float32(damping))
    if not jnp.isfinite(rounded).all():
        raise ValueError(
            f"the Hessian of layer {layer.path!r} is singular with damping={damping}: raise it"
        )
    back = lambda matrix: matrices.from_matrix(matrix, form, layer.weight_shape)
    return matrices.over_stack(back, layer.stack)(rounded).astype(weight.dtype)


@partial(jax.jit, static_argnames=("act_order", "block"))
def _solve(hessian, weight, steps, limits, damping, *, act_order, block):
    """Rounds the weight of one group, [inputs, outputs].

    `hessian` is [inputs, inputs]; `steps` are the scale and the zero point of each weight.
    """
    inputs, outputs = weight.shape
    # Inputs of large energy first: their errors can be made up for by many others.
    diagonal = jnp.diagonal(hessian)
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(inputs)
    upper = _factor(hessian[order][:, order], damping)
    # Whole blocks: the padded inputs have weight 0 and touch no others (an identity in U).
    whole = -(-inputs // block) * block
    more = whole - inputs
    upper = jnp.eye(whole).at[:inputs, :inputs].set(upper)
    pad = lambda a, value: jnp.pad(a[order], ((0, more), (0, 0)), constant_values=value)
    columns = (pad(steps[0], 1), pad(steps[1], 0))

    def step(i, carry):
        remaining, rounded = carry
        start = i * block
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, block)
        rows = cut(upper)
        square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        block_rounded, errors = _round_block(cut(remaining), *map(cut, columns), square, limits)
        # The lazy update of the paper: the block's errors E, spread over all later inputs by
        # W -= U[block, :]ᵀ E. What is before the block changes too: by 0, `upper` is triangular.
        remaining -= jnp.matmul(rows.T, errors, precision=jax.lax.Precision.HIGHEST)
        return remaining, jax.lax.dynamic_update_slice_in_dim(rounded, block_rounded, start, 0)

    start = (pad(weight, 0), jnp.zeros((whole, outputs)))
    rounded = jax.lax.fori_loop(0, whole // block, step, start)[1]
    return jnp.zeros_like(weight).at[order].set(rounded[:inputs])


def _factor(hessian: Array, damping: Array) -> Array:
    """The upper factor U of the damped inverse, UᵀU = H⁻¹, but for a scale that cancels.

    With the order of the inputs reversed, H = L Lᵀ; then U is L⁻¹ reversed. So there is no inverse
    to factor again.
    """
    diagonal = jnp.diagonal(hessian)
    mean = diagonal.mean()
    normal = hessian / jnp.where(mean > 0, mean, 1)
    # Dampen the Hessian. An input that is always 0 gets a diagonal of its own.
    normal += jnp.diag(damping + (diagonal == 0))
    lower = jnp.linalg.cholesky(normal[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(lower)), lower=True)
    return inverse[::-1, ::-1]


def _round_block(weight, scale, zero_point, upper, limits):
    """A block of inputs, one by one; returns what they are rounded to, and the errors to spread."""

    def step(i, carry):
        # Input i is rounded; δ = (w - q) / U[i, i] goes to the block's later ones by U[i, :].
        # Invariant: rows before i are done, rows from i on are float and already corrected.
        weight, rounded, errors = carry
        quantizer = limits.replace(scale=scale[i], zero_point=zero_point[i])
        nearest = grid.from_codes(grid.to_codes(weight[i], quantizer), quantizer)
        error = (weight[i] - nearest) / upper[i, i]
        weight -= jnp.outer(upper[i], error)
        return weight, rounded.at[i].set(nearest), errors.at[i].set(error)

    start = (weight, jnp.zeros_like(weight), jnp.zeros_like(weight))
    return jax.lax.fori_loop(0, len(weight), step, start)[1:]
