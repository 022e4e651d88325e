"""Teacher-guided calibration: scales and rounding chosen for the outputs, not for the layers."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging

from kdq.quantize.inputs import Batch, Inputs, reboxed, unboxed
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.ptq import adam, rounding
from kdq.quantize.ptq.divergence import check_logits, kl
from kdq.quantize.ptq.options import Progress, as_list, check_positive, quiet
from kdq.quantize.ptq.weights import put_weights, rounded, weights_of
from kdq.quantize.scales import replace_scales, scales
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

Teacher = Callable[[Any], Array]


def teacher_guided(
    network: Network | nn.Module,
    variables: Variables,
    qparams: QParams,
    batches: Iterable[Batch],
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

    Args:
      network: any Linen module, or a `Network`, whose output is an array of logits [..., classes].
      variables: its float variables.
      qparams: from `calibrate`.
      batches: two or more unlabelled inputs of the model, of one shape.
      target: the float model's, where `variables` have been changed since; None: `variables`.
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
      progress: (items, description) -> items.

    Returns:
      variables whose quantized weights are on their grids, and qparams with the scales found.

    Raises:
      ValueError: fewer than two batches, an option out of range, outputs that are no logits, that
        are not finite or differ in classes.
    """
    raw = list(batches)
    batches = as_list(raw, "teacher_guided")
    check_positive(
        "teacher_guided", learning_rate=learning_rate, checks=checks, temperature=temperature
    )
    if len(batches) < 2:
        raise ValueError("teacher_guided got 1 batch: want 2 or more, a quarter is held out")
    network, boxed, variables = as_network(network), variables, unboxed(variables)
    target = variables if target is None else unboxed(target)
    key, order_key = jax.random.split(jax.random.key(seed))
    order = [int(i) for i in jax.random.permutation(order_key, len(batches))]
    batches, raw = [batches[i] for i in order], [raw[i] for i in order]
    logits = None if teacher is None else [teacher(inputs) for inputs in raw]
    wanted = _reference(network, target, logits, batches)
    held = max(1, len(batches) // 4)
    unseen = list(zip(batches[:held], wanted[:held], strict=True))
    fitted = jax.tree.map(lambda *a: jnp.stack(a), *batches[held:]), wanted[held:]
    search = _Search(network, variables, qparams, fitted, unseen, jnp.float32(temperature))
    options = {
        "rates": (jnp.float32(learning_rate), jnp.float32(scale_learning_rate)),
        "regularization": jnp.float32(regularization),
    }
    for name, steps in (("scales", scale_steps), ("rounding", rounding_steps)):
        key, phase_key = jax.random.split(key)
        search.phase(name, steps, checks, options, phase_key, progress)
    logging.info("teacher_guided: KL %.4g, nearest %.4g", search.best, search.first)
    return reboxed(search.variables, boxed), search.qparams


def _reference(
    network: Network, variables: Variables, logits: list[Array] | None, batches: Sequence[Inputs]
) -> Array:
    """[batches, ..., classes]: the logits of the teacher; None: of the model. Raises ValueError."""
    shape = jax.eval_shape(partial(_logits, network), variables, {}, batches[0])
    check_logits("teacher_guided", "the model's outputs", shape)
    if logits is None:
        forward = jax.jit(partial(_logits, network))
        logits = [forward(variables, {}, inputs) for inputs in batches]
    for array in logits:
        check_logits("teacher_guided", "the teacher's outputs", array, shape.shape)
    logits = jnp.stack(logits)
    if not bool(jnp.isfinite(logits).all()):
        raise ValueError("teacher_guided: the teacher's logits are not finite")
    return logits


def _logits(network: Network, variables: Variables, qparams: QParams, inputs: Inputs) -> Array:
    weights = Weights(variables=variables, qparams=qparams)
    return network.select_prediction(network.run(weights, inputs)[0])


class _Search:
    """What was found best so far, and the phases that look for better."""

    def __init__(self, network, variables, qparams, fitted, unseen, temperature):
        self._static = {"network": network}
        self._float = variables
        self._fitted, self._unseen, self._temperature = fitted, unseen, temperature
        self.qparams = qparams
        self.variables = rounded(variables, qparams)
        self.first = self.best = self._measure(self.variables, qparams)
        if not jnp.isfinite(self.first):
            raise ValueError("teacher_guided: the quantized model's outputs are not finite")
        self._start_kl = jnp.float32(self.first) if self.first > 0 else jnp.float32(1)

    def _measure(self, variables: Variables, qparams: QParams) -> float:
        found = [
            _held_out(variables, qparams, inputs, wanted, self._temperature, **self._static)
            for inputs, wanted in self._unseen
        ]
        return float(sum(found)) / len(found)

    def phase(self, name, steps, checks, options, key, progress) -> None:
        """Steps from the best so far; keeps what a check finds better."""
        if steps == 0:
            return
        qparams = self.qparams
        floats = weights_of(self._float["params"], qparams) if name == "rounding" else {}
        quantizers = {path: qparams[path]["weights"] for path in floats}
        started = {path: rounding.start(w, quantizers[path]) for path, w in floats.items()}
        below = {path: codes for path, (codes, _) in started.items()}
        trained = ({path: v for path, (_, v) in started.items()}, _to_log(scales(qparams)))
        state = adam.start(trained)
        options = {
            **options,
            "start": self._start_kl,
            "steps": jnp.float32(steps),
            "temperature": self._temperature,
        }
        ends = sorted({round(steps * i / checks) for i in range(1, checks + 1)} - {0})
        step = 0
        for end in progress(ends, f"teacher_guided: {name}"):
            for number in range(step, end):
                state = _step(
                    state,
                    self._float,
                    qparams,
                    below,
                    self._fitted,
                    options,
                    key,
                    number,
                    **self._static,
                )
            step = end
            self._keep(*_decide(state[0], self._float, qparams, below))

    def _keep(self, variables: Variables, qparams: QParams) -> None:
        found = self._measure(variables, qparams)
        if found < self.best:
            self.best, self.variables, self.qparams = found, variables, qparams


@partial(jax.jit, static_argnames=("network",))
def _held_out(variables, qparams, inputs, wanted, temperature, *, network):
    logits = _logits(network, variables, qparams, inputs)
    return _softened(wanted, logits, temperature)


def _softened(wanted: Array, logits: Array, temperature: Array) -> Array:
    """T² KL at the temperature T, the mean over all examples."""
    return temperature**2 * kl(wanted / temperature, logits / temperature).mean()


@partial(jax.jit, static_argnames=("network",), donate_argnames=("state",))
def _step(
    state,
    variables,
    qparams,
    below,
    data,
    options,
    key,
    number,
    *,
    network,
):
    """One of Adam; rounding is soft where `below` has codes."""
    count = sum(codes.size for codes in below.values())

    def loss(trained, step):
        v, log_scales = trained
        now = replace_scales(qparams, _from_log(log_scales))
        soft = {p: rounding.soft(codes, v[p], now[p]["weights"]) for p, codes in below.items()}
        params = put_weights(variables["params"], soft)
        rest = {
            path: {name: q for name, q in own.items() if name != "weights" or path not in soft}
            for path, own in now.items()
        }
        pick = jax.random.randint(jax.random.fold_in(key, step), (), 0, len(data[1]))
        inputs, wanted = jax.tree.map(lambda a: a[pick], data)
        logits = _logits(network, {**variables, "params": params}, rest, inputs)
        total = _softened(wanted, logits, options["temperature"]) / options["start"]
        if not soft:
            return total
        beta, on = rounding.annealed_beta(step, options["steps"])
        undecided = sum(rounding.regularizer(one, beta) for one in v.values()) / count
        return total + on * options["regularization"] * undecided

    return adam.step(loss, state, options["rates"], number, options["steps"])


@jax.jit
def _decide(trained, variables, qparams, below):
    """The model as it would be returned: scales as they are, weights on their grids."""
    v, log_scales = trained
    now = replace_scales(qparams, _from_log(log_scales))
    weighted = {p: q["weights"] for p, q in now.items() if "weights" in q}
    floats = weights_of(variables["params"], now)
    weights = {
        path: rounding.hard(below[path], v[path], quantizer)
        if path in below
        else fake_quantize(floats[path], quantizer)
        for path, quantizer in weighted.items()
    }
    return {**variables, "params": put_weights(variables["params"], weights)}, now


def _to_log(found):
    """Scales by their logarithms, so that they stay positive; what else trains as it is."""
    log = lambda path, a: jnp.log(a) if path[-1].key == "scale" else a
    return jax.tree.map_with_path(log, found)


def _from_log(found):
    exp = lambda path, a: jnp.exp(a) if path[-1].key == "scale" else a
    return jax.tree.map_with_path(exp, found)
