"""Reconstruction: rounding by which a piece of the network returns what it did in float."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from kdq.quantize.ptq.options import Progress, check_positive, quiet
from kdq.quantize.ptq.units import Call, Unit, Watch, in_order, stack_roots
from kdq.quantize.scales import replace_scales, scales
from kdq.quantize.simulate import put_weights, rounded, weights_of
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

# (module, variables, quantizers of inputs, args, key, drop, **kwargs) -> outputs
Runner = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of a reconstruction; all but batch size and seed are data to the compiled function.

    Raises ValueError for one that is not above 0.
    """

    method: str  # for messages
    steps: int
    learning_rate: float
    batch_size: int
    regularization: float
    seed: int
    scale_learning_rate: float = 0.0  # of log scales of activations; 0 keeps them
    drop: float = 0.0

    def __post_init__(self):
        names = ("steps", "learning_rate", "batch_size")
        check_positive(self.method, **{name: getattr(self, name) for name in names})

    def arrays(self) -> dict[str, Array]:
        """The numbers that are data."""
        fields = dataclasses.asdict(self)
        for name in ("method", "batch_size", "seed"):
            del fields[name]
        return jax.tree.map(jnp.asarray, fields)


class Example(NamedTuple):
    """The data of one call of a unit: a row for each row of all batches."""

    arrays: list[Array]  # in, as the quantized layers before the unit make them
    float_arrays: list[Array]  # in, of the float model
    targets: list[Array]  # the unit's float outputs in the float model
    importance: list[Array] | None  # weights of the squared errors, of the shapes of `targets`

    def pick(self, call: Call, rows: Array) -> "Example":
        """Some rows; an array in that has none stays."""
        take = lambda arrays: [
            a[rows] if has else a for a, has in zip(arrays, call.rows, strict=True)
        ]
        return Example(
            arrays=take(self.arrays),
            float_arrays=take(self.float_arrays),
            targets=[target[rows] for target in self.targets],
            importance=None if self.importance is None else [w[rows] for w in self.importance],
        )


def run_quantized(module, variables, qparams, args, key, drop, /, **kwargs) -> Any:
    """The runner that quantizes inputs as they will be."""
    return simulate.run(module, variables, qparams, Inputs(*args, **kwargs))[0]


def reconstruct(
    watch: Watch,
    variables: Variables,
    qparams: QParams,
    target: Variables | None,
    units: Sequence[Unit],
    settings: Settings,
    *,
    runner: Runner = run_quantized,
    importance: Callable[..., list[list[Array]]] | None = None,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """Learns the rounding of each unit in order; all other quantized weights go to the nearest.

    For each, over `steps` of Adam on random rows: the squared error of its outputs, weighted by
    importance, as a part of that of rounding to nearest, plus `regularization` times the mean of
    `rounding.regularizer` over its weights. Rounding to nearest stays where learning did not help.

    Args:
      watch: the model and its batches.
      variables: with float weights.
      qparams: calibrated.
      target: of the float model whose outputs are aimed at; None: `variables`.
      units: see `units.describe`.
      settings: numbers.
      runner: how a unit is run while it trains.
      importance: (variables, qparams, unit, index) -> by call, by float output, [rows, ...] >= 0.
      progress: (items, description) -> items.
    """
    floats, target = variables, variables if target is None else target
    key = jax.random.key(settings.seed)
    by_path = {unit.path: unit for unit in units}
    roots = stack_roots(watch.network, variables, watch.batches[0])
    order = in_order({path: unit.stack(variables) for path, unit in by_path.items()}, roots)
    for path, index in progress(list(order), settings.method):
        unit = by_path[path]
        quantized = watch.seen(variables, qparams, unit, index)
        in_float = watch.seen(target, {}, unit, index)
        weights = [None] * len(unit.calls)
        if importance is not None:
            weights = importance(variables, qparams, unit, index)
        key, unit_key = jax.random.split(key)
        piece = _Piece(
            variables=unit.variables(floats, index),
            qparams=unit.qparams(qparams, index),
            data=[
                Example(arrays, float_arrays, targets, _without_padding(watch, targets, of_call))
                for (arrays, _), (float_arrays, targets), of_call in zip(
                    quantized, in_float, weights, strict=True
                )
            ],
            module=unit.module,
            calls=unit.calls,
            batch_size=settings.batch_size,
            trains_scales=settings.scale_learning_rate > 0,
            runner=runner,
        )
        learned, trained, before, after = _train(piece, settings, unit_key)
        logging.info(
            "%s: %s%s: error %.4g, nearest %.4g",
            *(settings.method, unit.path, list(index) if index else "", after, before),
        )
        variables = _with_weights(variables, unit, index, learned)
        qparams = _with_scales(qparams, unit, index, trained)
    return rounded(variables, qparams), qparams


def _without_padding(
    watch: Watch, targets: list[Array], importance: list[Array] | None
) -> list[Array] | None:
    """The importance of a call's errors, 0 at padding, so that a row's mean is over the rest."""
    counts = watch.counted(targets)
    if counts is None:
        return importance
    shares = []
    for target, counted in zip(targets, counts, strict=True):
        whole = jnp.broadcast_to(counted, target.shape).astype(jnp.float32)
        others = tuple(range(1, target.ndim))
        shares.append(whole / jnp.maximum(whole.mean(others, keepdims=True), 1e-30))
    if importance is None:
        return shares
    return [share * w for share, w in zip(shares, importance, strict=True)]


def _with_weights(variables, unit, index, weights) -> Variables:
    whole = {}
    for layer, weight in weights.items():
        params = at_path(variables["params"], unit.full(layer))
        old = jnp.asarray(params[weight_name(params)])
        whole[unit.full(layer)] = old.at[index].set(weight.astype(old.dtype))
    return {**variables, "params": put_weights(variables["params"], whole)}


def _with_scales(qparams, unit, index, trained) -> QParams:
    whole = {
        unit.full(layer): {
            name: {"scale": qparams[unit.full(layer)][name].scale.at[index].set(arrays["scale"])}
            for name, arrays in by_name.items()
        }
        for layer, by_name in trained.items()
    }
    return replace_scales(qparams, whole)


class _Piece(flax.struct.PyTreeNode):
    """A unit with its data."""

    variables: Any
    qparams: QParams
    data: list[Example]  # by call
    module: nn.Module = flax.struct.field(pytree_node=False)
    calls: tuple[Call, ...] = flax.struct.field(pytree_node=False)
    batch_size: int = flax.struct.field(pytree_node=False)
    trains_scales: bool = flax.struct.field(pytree_node=False)
    runner: Runner = flax.struct.field(pytree_node=False)

    @property
    def floats(self) -> dict[str, Array]:
        """The float weights whose rounding is learned, by relative path of the layer."""
        return weights_of(self.variables["params"], self.qparams)

    @property
    def quantizers(self) -> dict[str, Any]:
        """The quantizers of these weights."""
        return {path: self.qparams[path]["weights"] for path in self.floats}

    @property
    def inputs(self) -> QParams:
        """The quantizers of the layers' inputs."""
        inputs = {
            path: {name: q for name, q in quantizers.items() if name != "weights"}
            for path, quantizers in self.qparams.items()
        }
        return {path: by_name for path, by_name in inputs.items() if by_name}

    def log_scales(self) -> dict[str, Any]:
        """Logarithms of the inputs' scales that train, as they were calibrated."""
        if not self.trains_scales:
            return {}
        return {
            path: {name: {"scale": jnp.log(arrays["scale"])} for name, arrays in by_name.items()}
            for path, by_name in scales(self.inputs).items()
            if all("scale" in arrays for arrays in by_name.values())
        }

    def row_errors(self, i, example, weights, log_scales, key, drop) -> Array:
        """[rows]: the errors of the i-th call with these weights and scales of activations."""
        call = self.calls[i]
        params = put_weights(self.variables["params"], weights)
        args, kwargs = call.arguments(example.arrays)
        quantizers = replace_scales(self.inputs, jax.tree.map(jnp.exp, log_scales))
        outputs = self.runner(
            self.module,
            {**self.variables, "params": params},
            quantizers,
            args,
            key,
            drop,
            method=call.method,
            **kwargs,
        )
        leaves = zip(jax.tree.leaves(outputs), call.outputs, strict=True)
        return _row_errors([a for a, kept in leaves if kept], example)

    def errors(self, weights, log_scales) -> list[Array]:
        """The mean error of each call over all rows; inputs are quantized as they will be."""
        piece = self.replace(runner=run_quantized)
        counts = [example.targets[0].shape[0] for example in self.data]
        starts = range(0, max(counts), self.batch_size)
        sums = [_error_sums(piece, weights, log_scales, start) for start in starts]
        totals = map(sum, zip(*sums, strict=True))
        return [total / count for total, count in zip(totals, counts, strict=True)]

    def batch_error(self, weights, log_scales, before, key, drop) -> Array:
        """The mean error over random rows, as a part of `before`; the mean over the calls."""
        total = 0.0
        for i, (call, example) in enumerate(zip(self.calls, self.data, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            count = example.targets[0].shape[0]
            picked = example.pick(call, jax.random.randint(keys[0], (self.batch_size,), 0, count))
            if self.runner is not run_quantized:
                picked = picked._replace(arrays=_mix(keys[1], drop, call, picked))
            errors = self.row_errors(i, picked, weights, log_scales, keys[2], drop)
            total += errors.mean() / _above_0(before[i])
        return total / len(self.calls)


def _train(
    piece: _Piece, settings: Settings, key: Array
) -> tuple[dict[str, Array], Any, float, float]:
    """Rounded weights, scales of activations, and the errors of nearest and learned rounding."""
    nearest, old_scales = _nearest(piece), piece.log_scales()
    before = piece.errors(nearest, old_scales)
    (state, codes), options = _start(piece), settings.arrays()
    for number in range(settings.steps):
        state = _step(state, codes, piece, before, options, key, number)
    v, new_scales = state[0]
    learned = _decided(codes, v, piece.quantizers)
    after = piece.errors(learned, new_scales)
    ratio = sum(a / _above_0(b) for a, b in zip(after, before, strict=True)) / len(piece.calls)
    if not ratio <= 1:
        learned, new_scales, after = nearest, old_scales, before
    return learned, jax.tree.map(jnp.exp, new_scales), float(sum(before)), float(sum(after))


@jax.jit
def _nearest(piece: _Piece) -> dict[str, Array]:
    quantizers = piece.quantizers
    return {path: fake_quantize(w, quantizers[path]) for path, w in piece.floats.items()}


@jax.jit
def _start(piece: _Piece) -> tuple[adam.State, dict[str, Array]]:
    """The state before the first step, and the codes below each weight."""
    quantizers = piece.quantizers
    started = {path: rounding.start(w, quantizers[path]) for path, w in piece.floats.items()}
    v = {path: soft for path, (_, soft) in started.items()}
    codes = {path: below for path, (below, _) in started.items()}
    return adam.start((v, piece.log_scales())), codes


@jax.jit(donate_argnames=("state",))
def _step(state, codes, piece, before, options, key, number) -> adam.State:
    """One step of Adam on V and on the log scales."""
    quantizers = piece.quantizers
    around = {path: rounding.neighbours(below, quantizers[path]) for path, below in codes.items()}
    count = sum(below.size for below in codes.values())

    def loss(trained: tuple, number: Array) -> Array:
        v, log_scales = trained
        # Soft weights: between the numbers of the two codes around each, by h(V).
        soft = {
            path: low + rounding.rectified_sigmoid(v[path]) * (high - low)
            for path, (low, high) in around.items()
        }
        step_key = jax.random.fold_in(key, number)
        error = piece.batch_error(soft, log_scales, before, step_key, options["drop"])
        # The regularizer counts after the warm-up; β falls, so that each V must decide.
        beta, on = rounding.annealed_beta(number, options["steps"])
        undecided = sum(rounding.regularizer(layer_v, beta) for layer_v in v.values()) / count
        return error + on * options["regularization"] * undecided

    rates = options["learning_rate"], options["scale_learning_rate"]
    return adam.step(loss, state, rates, number)


@jax.jit
def _decided(codes: dict[str, Array], v: dict[str, Array], quantizers: dict[str, Any]):
    return {path: rounding.hard(below, v[path], quantizers[path]) for path, below in codes.items()}


@jax.jit
def _error_sums(piece: _Piece, weights, log_scales, start: Array) -> list[Array]:
    """The sum of the errors of each call over a batch of its rows, from `start` on."""
    sums = []
    for i, (call, example) in enumerate(zip(piece.calls, piece.data, strict=True)):
        count = example.targets[0].shape[0]
        rows = start + jnp.arange(piece.batch_size)
        picked = example.pick(call, jnp.minimum(rows, count - 1))
        errors = piece.row_errors(i, picked, weights, log_scales, None, 0)
        sums.append(jnp.where(rows < count, errors, 0).sum())
    return sums


def _above_0(error: Array) -> Array:
    return jnp.where(error > 0, error, 1.0)


def _mix(key: Array, drop: Array, call: Call, example: Example) -> list[Array]:
    """Arrays in, each float element of them that of the float model with probability `drop`."""
    mixed = []
    arrays = zip(example.arrays, example.float_arrays, call.rows, strict=True)
    for i, (x, y, has_rows) in enumerate(arrays):
        if has_rows and jnp.issubdtype(x.dtype, jnp.floating):
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), drop, x.shape), y, x)
        mixed.append(x)
    return mixed


def _row_errors(outputs: list[Array], example: Example) -> Array:
    """[rows]: the mean squared error of each, over the elements of all arrays."""
    pairs = zip(outputs, example.targets, strict=True)
    errors = [(o - t).astype(jnp.float32) for o, t in pairs]
    squared = [error**2 for error in errors]
    if example.importance is not None:
        weighted = list(zip(errors, example.importance, strict=True))
        squared = [jnp.where(w > 0, error, 0) ** 2 * w for error, w in weighted]
    per_row = [s.reshape(len(s), -1) for s in squared]
    return sum(s.sum(1) for s in per_row) / sum(s.shape[1] for s in per_row)
