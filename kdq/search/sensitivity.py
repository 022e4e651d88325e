"""How much each layer's quantization, alone, moves the student: by choice, on held-out examples.

The teacher-guided measure, "kl", asks how far a choice takes the student from what its teacher
says. All but "fisher" and "hessian" are differences of an objective with one layer quantized and
with none: as many evaluations of policies as there are choices.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import quantize
from kdq.distill.losses import cross_entropy
from kdq.fields import ConfigError, unknown
from kdq.quantize.kinds import weight_name
from kdq.quantize.layers import list_layers
from kdq.quantize.observe import observe
from kdq.quantize.paths import at_path
from kdq.search import bank as banks
from kdq.search.bank import Bank
from kdq.search.evaluate import OBJECTIVES, Evaluator, Held
from kdq.types import Array, Variables

MEASURES = (*OBJECTIVES, "fisher", "hessian")

Table = list[np.ndarray]  # of each layer, in the evaluator's order: [choices] float64


def measure(
    name: str, evaluator: Evaluator, *, probes: int = 32, seed: int = 0
) -> tuple[Table, float]:
    """The sensitivity of each layer to each of its choices, and the value without any.

    Args:
      name: one of `MEASURES`. "kl", "loss", "error" and "noise" are the increase of these. "fisher"
        is the increase of KL(student ‖ quantized student) to second order; "hessian" the half of
        each tensor's mean curvature times its squared error, of the loss by labels, as in HAWQ-V2
        (arXiv:1911.03852).
      evaluator: of the student.
      probes: random vectors of Hutchinson's estimate, for "hessian".
      seed: of these.
    """
    if name not in MEASURES:
        raise ConfigError(unknown("sensitivity:", name, MEASURES))
    if name == "fisher":
        return _fisher(evaluator), 0.0
    if name == "hessian":
        return _hessian(evaluator, probes, seed), 0.0
    policies = [evaluator.float_policy, *_alone(evaluator)]
    scores = evaluator(policies)[name]
    increases = scores[1:] - scores[0]
    sizes = [len(own) for own in evaluator.choices.values()]
    return np.split(increases, np.cumsum(sizes)[:-1]), float(scores[0])


def pairs(
    name: str, evaluator: Evaluator, table: Table, base: float
) -> dict[tuple[int, int, int, int], float]:
    """What two layers' choices add beyond the sum of each alone (arXiv:2307.05657).

    `{(layer, choice, other layer, its choice): f(both) - f(one) - f(other) + f(none)}`.

    Args:
      name: one of OBJECTIVES.
      evaluator: of the student.
      table: from `measure`, of that name.
      base: likewise.
    """
    if name not in OBJECTIVES:
        raise ConfigError(unknown("pairs of layers are evaluated by:", name, OBJECTIVES))
    sizes, keys, policies = [len(own) for own in evaluator.choices.values()], [], []
    for i, j in zip(*np.triu_indices(len(sizes), 1), strict=True):
        for a, b in np.ndindex(sizes[i], sizes[j]):
            policy = list(evaluator.float_policy)
            policy[i], policy[j] = a, b
            policies.append(policy)
            keys.append((int(i), a, int(j), b))
    scores = evaluator(policies)[name]
    return {
        (i, a, j, b): float(score - base - table[i][a] - table[j][b])
        for (i, a, j, b), score in zip(keys, scores, strict=True)
    }


def _alone(evaluator: Evaluator) -> list[tuple[int, ...]]:
    """Policies that quantize one layer each."""
    found = []
    for i, own in enumerate(evaluator.choices.values()):
        for choice in range(len(own)):
            policy = list(evaluator.float_policy)
            policy[i] = choice
            found.append(tuple(policy))
    return found


def _fisher(evaluator: Evaluator) -> Table:
    """½ E[Var_p(dz)]: dz is how the logits change to first order, p the student's own softmax.

    That is the quadratic form of the Fisher matrix with the error of the quantized tensors, weights
    and inputs alike, without ever making the matrix: one forward-mode derivative a choice.
    """
    found = []
    for policy in _alone(evaluator):
        chosen = {path: np.int32(at) for path, at in zip(evaluator.choices, policy, strict=True)}
        sums = [
            _variance(evaluator.model, evaluator.variables, evaluator.bank, chosen, held)
            for held in evaluator.held
        ]
        total, count = np.sum(np.asarray(sums, np.float64), 0)
        found.append(0.5 * total / count)
    sizes = [len(own) for own in evaluator.choices.values()]
    return np.split(np.array(found), np.cumsum(sizes)[:-1])


@partial(jax.jit, static_argnames=("model",))
def _variance(model: nn.Module, variables: Variables, bank: Bank, chosen, held: Held):
    qparams = banks.choose(bank, chosen)

    def logits(share: Array) -> Array:
        """Of the model so far on the way from float to quantized."""

        def rounding(x: Array, quantizer: quantize.Quantizer) -> Array:
            fixed = jax.lax.stop_gradient(x)
            return x + share * (quantize.fake_quantize(fixed, quantizer) - fixed)

        return quantize.apply(model, variables, qparams, held.images, rounding=rounding)

    at, change = jax.jvp(logits, (jnp.float32(0),), (jnp.float32(1),))
    p = jax.nn.softmax(at)
    mean = jnp.sum(p * change, -1, keepdims=True)
    variance = jnp.sum(p * jnp.square(change - mean), -1)
    return jnp.stack([jnp.sum(held.mask * variance), jnp.sum(held.mask)])


def _hessian(evaluator: Evaluator, probes: int, seed: int) -> Table:
    """½ (Tr(H_t) / n_t) · ‖Q(t) - t‖² summed over a layer's quantized tensors t.

    H_t is the Hessian of the mean loss with respect to the tensor: the weight, or the layer's
    input, each example's own.
    """
    curvature = _curvatures(evaluator, probes, seed)
    weights = _weight_errors(evaluator.variables, evaluator.bank)
    inputs = _input_errors(evaluator)
    found = []
    for path in evaluator.choices:
        total = 0.0
        for operand, own in curvature[path].items():
            errors = weights[path] if operand == "weights" else inputs[path, operand]
            total = total + 0.5 * own * np.asarray(errors, np.float64)
        found.append(total[:-1])  # the last choice is float
    return found


def _weight_errors(variables: Variables, bank: Bank) -> dict[str, Array]:
    """{path: [choices]}: the squared error of each weight, summed."""
    found = {}
    for path, quantizers in bank.items():
        if "weights" in quantizers:
            layer = at_path(variables["params"], path)
            weight = layer[weight_name(layer)]
            errors = jax.vmap(
                lambda q, w=weight: jnp.square(quantize.fake_quantize(w, q) - w).sum()
            )
            found[path] = errors(quantizers["weights"])
    return found


def _input_errors(evaluator: Evaluator) -> dict[tuple[str, str], np.ndarray]:
    """{(path, operand): [choices]}: the squared error of each input, mean of the examples."""
    states = {}
    for path, quantizers in evaluator.bank.items():
        for operand in quantizers.keys() - {"weights"}:
            depth = quantizers[operand].qmin.ndim - 1  # a stack's axes go first, then the choices
            one = jax.tree.map(lambda a, n=depth: jnp.moveaxis(a, 0, n), quantizers[operand])
            energy = jnp.zeros(one.qmin.shape)
            states[path, operand] = {"quantizers": one, "energy": energy}
    watchers = dict.fromkeys(states, _add_energy)
    batches = [held.images[np.asarray(held.mask) > 0] for held in evaluator.held]
    found = observe(evaluator.model, evaluator.variables, {}, watchers, states, batches)
    examples = sum(len(images) for images in batches)
    choices = lambda energy: np.asarray(energy).reshape(-1, energy.shape[-1]).sum(0)
    return {key: choices(state["energy"]) / examples for key, state in found.items()}


def _add_energy(state, x: Array):
    errors = jax.vmap(lambda q: jnp.square(quantize.fake_quantize(x, q) - x).sum())
    return {**state, "energy": state["energy"] + errors(state["quantizers"])}


def _curvatures(evaluator: Evaluator, probes: int, seed: int) -> dict[str, dict[str, float]]:
    """{path: {operand: Tr(H) / n}}, by Hutchinson's estimate on the first batch."""
    held = evaluator.held[0]
    layers = list_layers(evaluator.model, evaluator.variables, held.images)
    zeros = {}
    for path, quantizers in evaluator.bank.items():
        layer = layers[path]
        shapes = {"activations": layer.input_shape, "other": layer.other_shape}
        shapes["weights"] = layer.weight_shape
        zeros[path] = {name: jnp.zeros((*layer.stack, *shapes[name])) for name in quantizers}
    totals = None
    for probe in range(probes):
        key = jax.random.fold_in(jax.random.key(seed), probe)
        found = _probe(evaluator.model, evaluator.variables, evaluator.bank, zeros, held, key)
        totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
    # An input is each example's own: the Hessian of the mean loss has a block for each, all of
    # which together are the loss's own, 1 / examples in size.
    size = lambda path, operand, zero: zero.size / (1 if operand == "weights" else len(held.images))
    return {
        path: {
            operand: float(total) / probes / size(path, operand, zeros[path][operand])
            for operand, total in own.items()
        }
        for path, own in totals.items()
    }


@partial(jax.jit, static_argnames=("model",))
def _probe(model: nn.Module, variables: Variables, bank: Bank, zeros, held: Held, key: Array):
    """vᵀHv of each tensor, with v of signs by chance; between tensors it is 0 in the mean."""
    names = [(path, operand) for path, own in zeros.items() for operand in own]

    def loss(moves):
        """With each tensor moved; the moves are in the place of its quantizers."""
        logits = quantize.apply(model, variables, moves, held.images, rounding=jnp.add)
        each = cross_entropy(logits, held.labels)
        return jnp.sum(held.mask * each) / jnp.sum(held.mask)

    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    signs = {
        path: {
            operand: jax.random.rademacher(keys[path, operand], zero.shape, zero.dtype)
            for operand, zero in own.items()
        }
        for path, own in zeros.items()
    }
    product = jax.jvp(jax.grad(loss), (zeros,), (signs,))[1]
    return jax.tree.map(lambda v, hv: jnp.vdot(v, hv), signs, product)
