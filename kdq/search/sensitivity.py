"""The harm that each layer's quantization, alone, does to the student, on held-out examples.

The teacher-guided measure, "kl", is how far a choice takes the student from its teacher. All but
"fisher" and "hessian" are differences of an objective with one layer quantized and with none: as
many evaluations of policies as there are choices.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq import quantize
from kdq.fields import ConfigError, unknown
from kdq.quantize import Network, Weights
from kdq.quantize.kinds import weight_name
from kdq.quantize.layers import list_layers
from kdq.quantize.observe import observe
from kdq.quantize.paths import at_path
from kdq.search import bank as banks
from kdq.search.bank import Bank
from kdq.search.evaluate import OBJECTIVES, Evaluator, HeldOut, distance, predict
from kdq.tasks import Task
from kdq.tasks.base import weighted_sum
from kdq.types import Array, Variables

MEASURES = (*OBJECTIVES, "fisher", "hessian")

Table = list[np.ndarray]  # of each layer, in the evaluator's order: [choices] float64


def measure(
    name: str, evaluator: Evaluator, *, probes: int = 32, seed: int = 0
) -> tuple[Table, float]:
    """Returns the sensitivity of each layer to each of its choices, and the value without any.

    Args:
      name: one of `MEASURES`. "kl", "loss", "error" and "noise" are the increase of these. "fisher"
        is the increase of KL(student ‖ quantized student) to second order; "hessian" the half of
        each tensor's mean curvature times its squared error, of the loss by labels, as in HAWQ-V2
        (arXiv:1911.03852).
      evaluator: of the student.
      probes: random vectors of Hutchinson's estimate, for "hessian".
      seed: of these.

    Raises:
      ConfigError: an unknown measure.
    """
    if name not in MEASURES:
        raise ConfigError(unknown("sensitivity:", name, MEASURES))
    if name == "hessian":
        return _hessian(evaluator, probes, seed), 0.0
    sizes = [len(choices) for choices in evaluator.choices.values()]
    single = [_policy(evaluator, {i: a}) for i, size in enumerate(sizes) for a in range(size)]
    if name == "fisher":
        values, base = np.array([_fisher(evaluator, policy) for policy in single]), 0.0
    else:
        scores = evaluator([evaluator.float_policy, *single])[name]
        values, base = scores[1:] - scores[0], float(scores[0])
    return np.split(values, np.cumsum(sizes)[:-1]), base


def pairs(
    name: str, evaluator: Evaluator, table: Table, base: float
) -> dict[tuple[int, int, int, int], float]:
    """Returns the objective that two layers' choices add beyond their sum (arXiv:2307.05657).

    `{(layer, choice, other layer, its choice): f(both) - f(one) - f(other) + f(none)}`; `table` and
    `base` are from `measure` of the same name, one of OBJECTIVES. Raises ConfigError for another.
    """
    if name not in OBJECTIVES:
        raise ConfigError(unknown("pairs of layers are evaluated by:", name, OBJECTIVES))
    sizes = [len(choices) for choices in evaluator.choices.values()]
    keys = [
        (int(i), a, int(j), b)
        for i, j in zip(*np.triu_indices(len(sizes), 1), strict=True)
        for a, b in np.ndindex(sizes[i], sizes[j])
    ]
    scores = evaluator([_policy(evaluator, {i: a, j: b}) for i, a, j, b in keys])[name]
    return {
        (i, a, j, b): float(score - base - table[i][a] - table[j][b])
        for (i, a, j, b), score in zip(keys, scores, strict=True)
    }


def _policy(evaluator: Evaluator, chosen: Mapping[int, int]) -> tuple[int, ...]:
    """Returns the policy that quantizes the layers {place: choice} alone."""
    return tuple(chosen.get(i, -1) for i in range(len(evaluator.choices)))


def _fisher(evaluator: Evaluator, policy: tuple[int, ...]) -> float:
    """Returns ½ E[dzᵀ F dz], dz the change of the outputs z to first order; see `curvature`.

    That is the quadratic form of the Fisher matrix with the error of the quantized tensors, weights
    and inputs alike, without ever making the matrix: one forward-mode derivative a choice.
    """
    args = evaluator.network, evaluator.variables, evaluator.bank, evaluator.chosen(policy)
    sums = [_fisher_sum(*args, held, task=evaluator.task) for held in evaluator.held]
    total, count = np.sum(np.asarray(sums, np.float64), 0)
    return 0.5 * total / count


@partial(jax.jit, static_argnames=("network", "task"))
def _fisher_sum(
    network: Network,
    variables: Variables,
    bank: Bank,
    chosen: Mapping[str, Array],
    held: HeldOut,
    *,
    task: Task,
) -> Array:
    """Returns the sum of the quadratic form over a batch, and how many predictions count, [2]."""
    weights = Weights(variables=variables, qparams=banks.choose(bank, chosen))

    def outputs(share: Array) -> Array:
        """Returns those with tensors so far on the way from float to quantized."""

        def rounding(x: Array, quantizer: quantize.Quantizer) -> Array:
            fixed = jax.lax.stop_gradient(x)
            return x + share * (quantize.fake_quantize(fixed, quantizer) - fixed)

        return predict(network, weights, task.inputs(held.batch), rounding=rounding)

    at, change = jax.jvp(outputs, (jnp.float32(0),), (jnp.float32(1),))
    return jnp.stack(weighted_sum(curvature(task, at, change), task.weights(held.batch)))


def curvature(task: Task, outputs: Array, change: Array) -> Array:
    """Returns the second derivative of the distance by `change`, of each prediction.

    The quadratic form of `change` [..., outputs] with the Hessian of the distance of outputs from
    themselves: of a divergence of distributions the Fisher matrix of the predictions. For a softmax
    p that is Var_p(change).
    """
    if task.categorical:
        p = jax.nn.softmax(outputs)
        mean = jnp.sum(p * change, -1, keepdims=True)
        return jnp.sum(p * jnp.square(change - mean), -1)

    def moved(share: Array) -> Array:
        scores = task.divergence(outputs + share * change, outputs)
        values = [scores[name] for name in distance(task).scores]
        return sum(jnp.sum(v.reshape(*outputs.shape[:-1], -1), -1) for v in values)

    slope = lambda share: jax.jvp(moved, (share,), (jnp.ones_like(share),))[1]
    return jax.jvp(slope, (jnp.float32(0),), (jnp.float32(1),))[1]


def _hessian(evaluator: Evaluator, probes: int, seed: int) -> Table:
    """Returns ½ (Tr(H_t) / n_t) · ‖Q(t) - t‖² summed over a layer's quantized tensors t.

    H_t is the Hessian of the mean loss with respect to the tensor: the weight, or the layer's
    input, each example's own.
    """
    curvatures, errors = _curvatures(evaluator, probes, seed), _input_errors(evaluator)
    table = []
    for path in evaluator.choices:
        total = 0.0
        for operand, value in curvatures[path].items():
            if operand == "weights":
                layer = at_path(evaluator.variables["params"], path)
                weight, quantizers = layer[weight_name(layer)], evaluator.bank[path]["weights"]
                error = _squared_errors(weight, quantizers)
            else:
                error = errors[path, operand]
            total = total + 0.5 * value * np.asarray(error, np.float64)
        table.append(total[:-1])  # the last choice is float
    return table


def _input_errors(evaluator: Evaluator) -> dict[tuple[str, str], np.ndarray]:
    """Returns {(path, operand): [choices]}: the squared error of each input, mean of examples."""
    states = {}
    for path, quantizers in evaluator.bank.items():
        for operand in quantizers.keys() - {"weights"}:
            depth = quantizers[operand].qmin.ndim - 1  # a stack's axes go first, then the choices
            last = jax.tree.map(lambda a, n=depth: jnp.moveaxis(a, 0, n), quantizers[operand])
            states[path, operand] = {"quantizers": last, "energy": jnp.zeros(last.qmin.shape)}
    watchers = dict.fromkeys(states, _add_energy)
    task, rows = evaluator.task, [held.rows(evaluator.task) for held in evaluator.held]
    batches = [
        jax.tree.map(lambda array, rows=counted: array[rows], task.inputs(held.batch))
        for held, counted in zip(evaluator.held, rows, strict=True)
    ]
    states = observe(evaluator.network, evaluator.variables, {}, watchers, states, batches)
    examples = sum(map(len, rows))
    choices = lambda energy: np.asarray(energy).reshape(-1, energy.shape[-1]).sum(0)
    return {key: choices(state["energy"]) / examples for key, state in states.items()}


def _add_energy(state: dict[str, Any], x: Array, counts: Array | None) -> dict[str, Any]:
    return {**state, "energy": state["energy"] + _squared_errors(x, state["quantizers"])}


def _squared_errors(x: Array, quantizers: quantize.Quantizer) -> Array:
    """Returns the summed squared error of `x` by each of stacked quantizers, [choices]."""
    error = lambda q: jnp.square(quantize.fake_quantize(x, q) - x).sum()
    return jax.vmap(error)(quantizers)


def _curvatures(evaluator: Evaluator, probes: int, seed: int) -> dict[str, dict[str, float]]:
    """Returns {path: {operand: Tr(H) / n}}, by Hutchinson's estimate on the first batch."""
    held = evaluator.held[0]
    inputs = evaluator.task.inputs(held.batch)
    layers = list_layers(evaluator.network, evaluator.variables, inputs)
    zeros = {}
    for path, quantizers in evaluator.bank.items():
        layer = layers[path]
        shapes = {"activations": layer.input_shape, "other": layer.other_shape}
        shapes["weights"] = layer.weight_shape
        zeros[path] = {name: jnp.zeros((*layer.stack, *shapes[name])) for name in quantizers}
    totals = None
    for probe in range(probes):
        key = jax.random.fold_in(jax.random.key(seed), probe)
        args = evaluator.network, evaluator.variables, zeros, held, key
        products = _probe(*args, task=evaluator.task)
        totals = products if totals is None else jax.tree.map(jnp.add, totals, products)
    # An input is each example's own: the Hessian of the mean loss has a block for each, all of
    # which together are the loss's own, 1 / examples in size.
    examples = len(jax.tree.leaves(inputs)[0])
    size = lambda path, operand, zero: zero.size / (1 if operand == "weights" else examples)
    return {
        path: {
            operand: float(total) / probes / size(path, operand, zeros[path][operand])
            for operand, total in products.items()
        }
        for path, products in totals.items()
    }


@partial(jax.jit, static_argnames=("network", "task"))
def _probe(
    network: Network,
    variables: Variables,
    zeros: dict[str, Any],
    held: HeldOut,
    key: Array,
    *,
    task: Task,
) -> dict[str, dict[str, Array]]:
    """Returns vᵀHv of each tensor, v of random signs; between tensors it is 0 in the mean."""

    def loss(moves: dict[str, Any]) -> Array:
        """Returns it with each tensor moved; the moves are in the place of its quantizers."""
        weights = Weights(variables=variables, qparams=moves)
        inputs = task.inputs(held.batch)
        outputs = predict(network, weights, inputs, rounding=jnp.add)
        total, count = weighted_sum(task.loss(outputs, held.batch), task.weights(held.batch))
        return total / count

    leaves, structure = jax.tree.flatten(zeros)
    keys = jax.random.split(key, len(leaves))
    signs = [
        jax.random.rademacher(k, zero.shape, zero.dtype)
        for k, zero in zip(keys, leaves, strict=True)
    ]
    signs = jax.tree.unflatten(structure, signs)
    product = jax.jvp(jax.grad(loss), (zeros,), (signs,))[1]
    return jax.tree.map(jnp.vdot, signs, product)
