"""Reconstruction: rounding by which a piece of the network returns what it did in float."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from absl import logging

from kdq.quantize import simulate
from kdq.quantize.inputs import Inputs
from kdq.quantize.kinds import weight_name
from kdq.quantize.paths import at_path
from kdq.quantize.ptq import adam, rounding
from kdq.quantize.ptq.options import Progress
from kdq.quantize.ptq.order import in_order
from kdq.quantize.ptq.units import Call, Unit, Watch
from kdq.quantize.ptq.weights import put_weights, rounded, weights_of
from kdq.quantize.scales import replace_scales, scales
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

# (module, variables, quantizers of inputs, args, key, drop, **kwargs) -> outputs
Runner = Callable[..., Any]
# By call: arrays in, and what is wanted of each float array out; by array out its weights or None.
Data = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of a reconstruction; all but the batch size are data to the compiled function."""

    steps: int
    learning_rate: float
    batch_size: int
    regularization: float
    seed: int
    scale_learning_rate: float = 0.0  # of log scales of activations; 0 keeps them
    drop: float = 0.0

    def arrays(self) -> dict[str, Array]:
        """What the compiled function gets."""
        own = dataclasses.asdict(self)
        del own["batch_size"], own["seed"]
        return jax.tree.map(jnp.asarray, own)


def plain(module, variables, qparams, args, key, drop, /, **kwargs) -> Any:
    """The runner that quantizes inputs as they will be."""
    return simulate.run(module, variables, qparams, Inputs(*args, **kwargs))[0]


def reconstruct(
    watch: Watch,
    variables: Variables,
    qparams: QParams,
    target: Variables,
    units: Sequence[Unit],
    roots: Sequence[str],
    settings: Settings,
    *,
    name: str,
    runner: Runner = plain,
    importance: Callable[..., list[list[Array]]] | None = None,
    progress: Progress,
) -> tuple[Variables, QParams]:
    """Learns the rounding of each unit in order; all other quantized weights go to the nearest.

    For each, over `steps` of Adam on random rows: the squared error of its outputs, weighted by
    importance, as a part of that of rounding to nearest, plus `regularization` times the mean of
    `rounding.regularizer` over its weights. Rounding to nearest stays where learning did not help.

    Args:
      watch: the model and its batches.
      variables: with float weights.
      qparams: calibrated.
      target: of the float model whose outputs are aimed at.
      units: see `units.describe`.
      roots: of stacks; see `order.stack_roots`.
      settings: numbers.
      name: of the method, for messages.
      runner: how a unit is run while it trains.
      importance: (variables, qparams, unit, index) -> by call, by float output, [rows, ...] >= 0.
      progress: (items, description) -> items.
    """
    floats = variables
    key = jax.random.key(settings.seed)
    by_path = {unit.path: unit for unit in units}
    order = in_order({path: unit.stack(variables) for path, unit in by_path.items()}, roots)
    for path, index in progress(list(order), name):
        unit = by_path[path]
        data = [
            {"arrays": arrays, "weights": None}
            for arrays, _ in watch.seen(variables, qparams, unit, index)
        ]
        for own, (arrays, outputs) in zip(data, watch.seen(target, {}, unit, index), strict=True):
            own |= {"float_arrays": arrays, "targets": outputs}
        if importance is not None:
            for own, weights in zip(data, importance(variables, qparams, unit, index), strict=True):
                own["weights"] = weights
        key, own_key = jax.random.split(key)
        piece = _Piece(
            variables=unit.variables(floats, index),
            qparams=unit.qparams(qparams, index),
            data=data,
            module=unit.module,
            calls=unit.calls,
            batch_size=settings.batch_size,
            trains_scales=settings.scale_learning_rate > 0,
        )
        weights, trained, before, after = _train(piece, settings, own_key, runner)
        where = f"{unit.path}{list(index) if index else ''}"
        logging.info("%s: %s: error %.4g, nearest %.4g", name, where, float(after), float(before))
        variables = _with_weights(variables, unit, index, weights)
        qparams = _with_scales(qparams, unit, index, trained)
    return rounded(variables, qparams), qparams


def _with_weights(variables, unit, index, weights) -> Variables:
    whole = {}
    for layer, weight in weights.items():
        own = at_path(variables["params"], unit.full(layer))
        old = jnp.asarray(own[weight_name(own)])
        whole[unit.full(layer)] = old.at[index].set(weight.astype(old.dtype))
    return {**variables, "params": put_weights(variables["params"], whole)}


def _with_scales(qparams, unit, index, trained) -> QParams:
    whole = {
        unit.full(layer): {
            name: {"scale": qparams[unit.full(layer)][name].scale.at[index].set(own["scale"])}
            for name, own in by_name.items()
        }
        for layer, by_name in trained.items()
    }
    return replace_scales(qparams, whole)


class _Piece(flax.struct.PyTreeNode):
    """A unit with its data."""

    variables: Variables  # with float weights
    qparams: QParams
    data: Data
    module: nn.Module = flax.struct.field(pytree_node=False)
    calls: tuple[Call, ...] = flax.struct.field(pytree_node=False)
    batch_size: int = flax.struct.field(pytree_node=False)
    trains_scales: bool = flax.struct.field(pytree_node=False)

    @property
    def floats(self) -> dict[str, Array]:
        """The weights to round, by layer."""
        return weights_of(self.variables["params"], self.qparams)

    @property
    def quantizers(self) -> dict[str, Any]:
        """Of these weights."""
        return {path: self.qparams[path]["weights"] for path in self.floats}

    @property
    def inputs(self) -> QParams:
        """The quantizers of what layers get."""
        found = {
            path: {name: one for name, one in own.items() if name != "weights"}
            for path, own in self.qparams.items()
        }
        return {path: by_name for path, by_name in found.items() if by_name}

    def log_scales(self) -> dict[str, Any]:
        """Of the inputs whose scales train, as they were calibrated."""
        if not self.trains_scales:
            return {}
        return {
            path: {name: {"scale": jnp.log(own["scale"])} for name, own in by_name.items()}
            for path, by_name in scales(self.inputs).items()
            if all("scale" in own for own in by_name.values())
        }

    def outputs(self, call, weights, log_scales, arrays, key, drop, runner) -> list[Array]:
        """The float outputs of a call with these weights and scales of activations."""
        params = put_weights(self.variables["params"], weights)
        args, kwargs = call.arguments(arrays)
        quantizers = replace_scales(self.inputs, jax.tree.map(jnp.exp, log_scales))
        variables = {**self.variables, "params": params}
        outputs = runner(
            self.module, variables, quantizers, args, key, drop, method=call.method, **kwargs
        )
        return [a for a, kept in zip(jax.tree.leaves(outputs), call.outputs, strict=True) if kept]

    def errors(self, weights, log_scales) -> list[Array]:
        """Of each call, the mean error over all rows; inputs are quantized as they will be."""
        counts = [own["targets"][0].shape[0] for own in self.data]
        starts = range(0, max(counts), self.batch_size)
        sums = [_error_sums(self, weights, log_scales, start) for start in starts]
        totals = map(sum, zip(*sums, strict=True))
        return [total / count for total, count in zip(totals, counts, strict=True)]

    def batch_error(self, weights, log_scales, before, key, drop, runner) -> Array:
        """The mean error over random rows, as a part of `before`; the mean over the calls."""
        total = 0.0
        for i, (call, own) in enumerate(zip(self.calls, self.data, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            rows = jax.random.randint(keys[0], (self.batch_size,), 0, own["targets"][0].shape[0])
            arrays, wanted, importance = _pick(call, own, rows)
            if runner is not plain:
                floats, *_ = _pick(call, own | {"arrays": own["float_arrays"]}, rows)
                arrays = _mix(keys[1], drop, call, arrays, floats)
            outputs = self.outputs(call, weights, log_scales, arrays, keys[2], drop, runner)
            total += _row_errors(outputs, wanted, importance).mean() / _above_0(before[i])
        return total / len(self.calls)


def _train(
    piece: _Piece, settings: Settings, key: Array, runner: Runner
) -> tuple[dict[str, Array], Any, Array, Array]:
    """Rounded weights, scales of activations, and the errors of nearest and learned rounding."""
    nearest, old_scales = _nearest(piece), piece.log_scales()
    before = piece.errors(nearest, old_scales)
    (state, codes), options = _start(piece), settings.arrays()
    for number in range(settings.steps):
        state = _step(state, codes, piece, before, options, key, number, runner=runner)
    v, new_scales = state[0]
    learned = _decided(codes, v, piece.quantizers)
    after = piece.errors(learned, new_scales)
    ratio = sum(a / _above_0(b) for a, b in zip(after, before, strict=True)) / len(piece.calls)
    found = (learned, new_scales, after) if ratio <= 1 else (nearest, old_scales, before)
    return found[0], jax.tree.map(jnp.exp, found[1]), sum(before), sum(found[2])


@jax.jit
def _nearest(piece: _Piece) -> dict[str, Array]:
    quantizers = piece.quantizers
    return {path: fake_quantize(w, quantizers[path]) for path, w in piece.floats.items()}


@jax.jit
def _start(piece: _Piece) -> tuple[adam.State, dict[str, Array]]:
    """The state before the first step, and the codes below each weight."""
    quantizers = piece.quantizers
    started = {path: rounding.start(w, quantizers[path]) for path, w in piece.floats.items()}
    v = {path: own for path, (_, own) in started.items()}
    codes = {path: below for path, (below, _) in started.items()}
    return adam.start((v, piece.log_scales())), codes


@partial(jax.jit, static_argnames=("runner",), donate_argnames=("state",))
def _step(
    state: adam.State,
    codes: dict[str, Array],
    piece: _Piece,
    before: list[Array],
    options: dict[str, Array],
    key: Array,
    number: Array,
    *,
    runner: Runner,
) -> adam.State:
    quantizers = piece.quantizers
    around = {path: rounding.neighbours(own, quantizers[path]) for path, own in codes.items()}
    count = sum(own.size for own in codes.values())

    def loss(trained: tuple, number: Array) -> Array:
        v, log_scales = trained
        soft = {
            path: low + rounding.rectified_sigmoid(v[path]) * (high - low)
            for path, (low, high) in around.items()
        }
        own_key = jax.random.fold_in(key, number)
        error = piece.batch_error(soft, log_scales, before, own_key, options["drop"], runner)
        beta, on = rounding.annealed_beta(number, options["steps"])
        undecided = sum(rounding.regularizer(one, beta) for one in v.values()) / count
        return error + on * options["regularization"] * undecided

    rates = options["learning_rate"], options["scale_learning_rate"]
    return adam.step(loss, state, rates, number)


@jax.jit
def _decided(codes: dict[str, Array], v: dict[str, Array], quantizers: dict[str, Any]):
    return {path: rounding.hard(own, v[path], quantizers[path]) for path, own in codes.items()}


@jax.jit
def _error_sums(piece: _Piece, weights, log_scales, start: Array) -> list[Array]:
    """Of each call, the sum of the errors of a batch of its rows, from `start` on."""
    sums = []
    for call, own in zip(piece.calls, piece.data, strict=True):
        count = own["targets"][0].shape[0]
        rows = start + jnp.arange(piece.batch_size)
        arrays, wanted, importance = _pick(call, own, jnp.minimum(rows, count - 1))
        outputs = piece.outputs(call, weights, log_scales, arrays, None, 0, plain)
        sums.append(jnp.where(rows < count, _row_errors(outputs, wanted, importance), 0).sum())
    return sums


def _above_0(error: Array) -> Array:
    return jnp.where(error > 0, error, 1.0)


def _pick(call: Call, own: dict[str, Any], rows: Array):
    """Some rows of the arrays in, of the targets and of their weights."""
    arrays = [a[rows] if has else a for a, has in zip(own["arrays"], call.rows, strict=True)]
    weights = None if own["weights"] is None else [w[rows] for w in own["weights"]]
    return arrays, [t[rows] for t in own["targets"]], weights


def _mix(key: Array, drop: Array, call: Call, arrays: list[Array], floats: list[Array]):
    """Each float element of the unit's own inputs that of the float model, with probability."""
    mixed = []
    for i, (x, y, has_rows) in enumerate(zip(arrays, floats, call.rows, strict=True)):
        if has_rows and jnp.issubdtype(x.dtype, jnp.floating):
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), drop, x.shape), y, x)
        mixed.append(x)
    return mixed


def _row_errors(outputs: list[Array], targets: list[Array], weights: list[Array] | None) -> Array:
    """[rows]: the mean squared error of each, over the elements of all arrays."""
    squared = [(o - t).astype(jnp.float32) ** 2 for o, t in zip(outputs, targets, strict=True)]
    if weights is not None:
        squared = [s * w for s, w in zip(squared, weights, strict=True)]
    per_row = [s.reshape(len(s), -1) for s in squared]
    return sum(s.sum(1) for s in per_row) / sum(s.shape[1] for s in per_row)
