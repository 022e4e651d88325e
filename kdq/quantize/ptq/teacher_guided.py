"""Teacher-guided calibration: scales and rounding chosen for the outputs, not for the layers."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.entropy import kl
from kdq.quantize.inputs import Inputs
from kdq.quantize.masks import counted
from kdq.quantize.network import Network, Weights
from kdq.quantize.ptq import adam, rounding
from kdq.quantize.ptq.options import Progress, check_logits, check_positive, ptq_method, quiet
from kdq.quantize.scales import Scales, replace_scales, scales
from kdq.quantize.simulate import put_weights, rounded, weights_of
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

Teacher = Callable[[Any], Array]


@ptq_method()
def teacher_guided(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    target: Variables | None = None,
    teacher: Teacher | None = None,
    scale_steps: int = 0,
    rounding_steps: int = 1000,
    scale_learning_rate: float = 3e-3,
    learning_rate: float = 0.1,
    regularization: float = 1.0,
    temperature: float = 4.0,
    checks: int = 10,
    seed: int = 0,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """The scales and the rounding of all layers at once, by the KL of the outputs to a teacher's.

    First Adam moves the logarithms of all scales, of weights and of activations, through
    straight-through rounding. Then weights may take either of the two codes around them, softly by
    h(V) (see `rounding`), and V and the scales are trained together:

        KL(teacher ‖ quantized) / KL at the start + regularization · mean(1 - |2 h(V) - 1|^β).

    A step sees one batch. A quarter of the batches, at least one, is held out: of what was met at
    the checks of both phases, and at the start, that with the smallest KL on these (its weights
    rounded) is returned; so it is never worse there than what came in, rounded to nearest.

    Args beside those of `options.ptq_method`:
      teacher: inputs -> logits [..., classes], of which only the softmax matters; None: the model
        with `target`.
      scale_steps: of the first phase; 0 leaves it out.
      rounding_steps: of the second; 0 leaves it out.
      scale_learning_rate: of log scales; 0 keeps them.
      learning_rate: of the rounding variables.
      regularization: how strongly the rounding is made to decide.
      temperature: T of the divergence, T² KL of the softmax of logits / T. Of examples that the
        network is sure of, nearly all those it was trained on, T = 1 sees next to nothing.
      checks: in each phase, evenly spaced.
      seed: of the choice of batches, held out and in each step.

    Raises:
      ValueError: fewer than two batches; outputs that are no logits [..., classes] or, of the
        teacher, differ from the model's in shape.
    """
    check_positive(
        "teacher_guided", learning_rate=learning_rate, checks=checks, temperature=temperature
    )
    if len(batches) < 2:
        raise ValueError(
            "teacher_guided got 1 batch: expected 2 or more, a quarter of which is held out"
        )
    key, order_key = jax.random.split(jax.random.key(seed))
    order = jax.random.permutation(order_key, len(batches))
    batches = [batches[int(i)] for i in order]
    logits = None if teacher is None else [teacher(inputs.batch) for inputs in batches]
    reference = _reference(network, variables if target is None else target, logits, batches)
    held = max(1, len(batches) // 4)
    unseen = list(zip(batches[:held], reference[:held], strict=True))
    fitted = list(zip(batches[held:], reference[held:], strict=True))
    weights = Weights(variables=variables, qparams=qparams)
    search = _Search(network, weights, fitted, unseen, jnp.float32(temperature))
    options = {
        "rates": (jnp.float32(learning_rate), jnp.float32(scale_learning_rate)),
        "regularization": jnp.float32(regularization),
    }
    for name, steps in (("scales", scale_steps), ("rounding", rounding_steps)):
        key, phase_key = jax.random.split(key)
        options |= {"steps": jnp.float32(steps), "key": phase_key}
        search.run_phase(name, steps, checks, options, progress)
    logging.info("teacher_guided: KL %.4g, nearest %.4g", search.best, search.first)
    return search.weights.variables, search.weights.qparams


def _reference(
    network: Network, variables: Variables, logits: list[Array] | None, batches: Sequence[Inputs]
) -> list[Array]:
    """By batch [..., classes]: the logits of the teacher; None: of the model. Raises ValueError."""
    weights = Weights(variables=variables, qparams={})
    shapes = [jax.eval_shape(partial(_logits, network), weights, inputs) for inputs in batches]
    check_logits("teacher_guided", "the model's outputs", shapes[0])
    if logits is None:
        forward = jax.jit(partial(_logits, network))
        logits = [forward(weights, inputs) for inputs in batches]
    for array, shape in zip(logits, shapes, strict=True):
        check_logits("teacher_guided", "the teacher's outputs", array, shape.shape)
    if not all(bool(jnp.isfinite(array).all()) for array in logits):
        raise ValueError("teacher_guided: the teacher's logits are not finite")
    return logits


def _logits(network: Network, weights: Weights, inputs: Inputs) -> Array:
    return network.select_prediction(network.run(weights, inputs)[0])


class _Search:
    """The best weights so far, and the phases that look for better."""

    def __init__(self, network, weights, fitted, unseen, temperature):
        self._network, self._float = network, weights.variables
        self._fitted, self._unseen, self._temperature = fitted, unseen, temperature
        rounded_variables = rounded(weights.variables, weights.qparams)
        self.weights = dataclasses.replace(weights, variables=rounded_variables)
        self.first = self.best = self._measure(self.weights)
        if not jnp.isfinite(self.first):
            raise ValueError("teacher_guided: the quantized model's outputs are not finite")
        self._start_kl = jnp.float32(self.first) if self.first > 0 else jnp.float32(1)

    def _measure(self, weights: Weights) -> float:
        """The mean KL on the batches that are held out."""
        values = [
            _held_out(weights, inputs, reference, self._temperature, network=self._network)
            for inputs, reference in self._unseen
        ]
        return float(sum(values)) / len(values)

    def run_phase(self, name: str, steps: int, checks: int, options: dict, progress) -> None:
        """Takes steps from the best so far; keeps what a check finds better."""
        if steps == 0:
            return
        qparams = self.weights.qparams
        floats = weights_of(self._float["params"], qparams) if name == "rounding" else {}
        quantizers = {path: qparams[path]["weights"] for path in floats}
        started = {path: rounding.start(w, quantizers[path]) for path, w in floats.items()}
        phase = _Phase(
            weights=Weights(variables=self._float, qparams=qparams),
            below={path: codes for path, (codes, _) in started.items()},
            options={**options, "start": self._start_kl, "temperature": self._temperature},
        )
        state = adam.start(({p: v for p, (_, v) in started.items()}, _to_log(scales(qparams))))
        ends = sorted({round(steps * i / checks) for i in range(1, checks + 1)} - {0})
        pick = lambda n: jax.random.randint(
            jax.random.fold_in(options["key"], n), (), 0, len(self._fitted)
        )
        picks = np.asarray(jax.vmap(pick)(jnp.arange(steps)))  # a step sees one batch
        step = 0
        for end in progress(ends, f"teacher_guided: {name}"):
            for number in range(step, end):
                state = _step(
                    state, phase, self._fitted[picks[number]], number, network=self._network
                )
            step = end
            weights = _decide(state[0], phase)
            if (value := self._measure(weights)) < self.best:
                self.best, self.weights = value, weights


class _Phase(NamedTuple):
    """The data of one phase's steps."""

    weights: Weights  # float variables, and the quantizers at its start
    below: dict[str, Array]  # the codes below each weight whose rounding is soft
    options: dict[str, Any]


@partial(jax.jit, static_argnames=("network",))
def _held_out(weights, inputs, reference, temperature, *, network):
    return _softened(reference, _logits(network, weights, inputs), temperature, inputs.mask)


def _softened(reference: Array, logits: Array, temperature: Array, mask: Array | None) -> Array:
    """T² KL at the temperature T, the mean over all examples, or positions, that count."""
    counts = counted(mask, logits)
    where = None if counts is None else jnp.broadcast_to(counts[..., 0], logits.shape[:-1])
    return temperature**2 * kl(reference / temperature, logits / temperature).mean(where=where)


@partial(jax.jit, static_argnames=("network",), donate_argnames=("state",))
def _step(state, phase, batch, number, *, network):
    """One step of Adam; rounding is soft where there are codes below."""
    variables, qparams = phase.weights.variables, phase.weights.qparams
    options, below = phase.options, phase.below
    count = sum(codes.size for codes in below.values())

    def loss(trained, step):
        v, log_scales = trained
        now = replace_scales(qparams, _from_log(log_scales))
        soft = {p: rounding.soft(codes, v[p], now[p]["weights"]) for p, codes in below.items()}
        params = put_weights(variables["params"], soft)
        # Weights that are soft already are not rounded once more.
        rest = {
            path: {k: q for k, q in quantizers.items() if k != "weights" or path not in soft}
            for path, quantizers in now.items()
        }
        inputs, reference = batch
        weights = Weights(variables={**variables, "params": params}, qparams=rest)
        logits = _logits(network, weights, inputs)
        divergence = _softened(reference, logits, options["temperature"], inputs.mask)
        total = divergence / options["start"]
        if not soft:
            return total
        beta, on = rounding.annealed_beta(step, options["steps"])
        undecided = sum(rounding.regularizer(layer_v, beta) for layer_v in v.values()) / count
        return total + on * options["regularization"] * undecided

    return adam.step(loss, state, options["rates"], number, options["steps"])


@jax.jit
def _decide(trained, phase):
    """The model as it would be returned: scales as they are, weights on their grids."""
    v, log_scales = trained
    variables, below = phase.weights.variables, phase.below
    now = replace_scales(phase.weights.qparams, _from_log(log_scales))
    floats = weights_of(variables["params"], now)
    weights = {
        path: rounding.hard(below[path], v[path], now[path]["weights"])
        if path in below
        else fake_quantize(weight, now[path]["weights"])
        for path, weight in floats.items()
    }
    params = put_weights(variables["params"], weights)
    return Weights(variables={**variables, "params": params}, qparams=now)


def _to_log(trained: Scales) -> Scales:
    """Scales by their logarithms, so that they stay positive; what else trains as it is."""
    log = lambda path, a: jnp.log(a) if path[-1].key == "scale" else a
    return jax.tree.map_with_path(log, trained)


def _from_log(trained: Scales) -> Scales:
    exp = lambda path, a: jnp.exp(a) if path[-1].key == "scale" else a
    return jax.tree.map_with_path(exp, trained)
