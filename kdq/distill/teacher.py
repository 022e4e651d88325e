"""Teachers: the sources of the logits and features that a student is to match.

A teacher is a pytree. Its structure is static: a compiled step is keyed by it. Its leaves, a frozen
network's weights, are data that no step changes. What steps do change is its `TeacherState`.
"""

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from kdq.distill import capture
from kdq.distill.capture import Outputs, with_streams
from kdq.quantize.network import Network, Weights
from kdq.types import Array, Batch, Variables


class TeacherState(flax.struct.PyTreeNode):
    """The arrays of a teacher that change while the student trains; {} of a frozen one."""

    params: Any = flax.struct.field(default_factory=dict)
    model_state: Any = flax.struct.field(default_factory=dict)  # other collections, "batch_stats"
    # Whether the optimizer trains `params`, towards what the student says.
    learns: bool = flax.struct.field(default=False, pytree_node=False)

    @property
    def variables(self) -> Variables:
        return {"params": self.params, **self.model_state}


class Teacher(flax.struct.PyTreeNode):
    """The contract of a teacher, called within `jit`.

    By itself it has no state and says nothing: the student learns from labels alone.
    """

    def init(self, params: Any, model_state: Any) -> TeacherState:
        """Returns the state before the first step of a student with these arrays."""
        return TeacherState()

    def ask(
        self,
        state: TeacherState,
        batch: Batch,
        inputs: tuple[Array, ...] = (),
        layers: Collection[str] = (),
        key: Array | None = None,
    ) -> tuple[Outputs | None, TeacherState]:
        """Returns its outputs for a batch, with the features of `layers`, and its state after it.

        A cache's outputs are part of the batch; `inputs` are the arguments of a network.
        """
        return None, state

    def update(self, state: TeacherState, params: Any, model_state: Any) -> TeacherState:
        """Returns the state after a step that ended with these arrays of the student."""
        return state


NO_TEACHER = Teacher()


class Model(Teacher):
    """One network that does not change: a trained one, or one loaded from a packed file."""

    network: Network | nn.Module = flax.struct.field(pytree_node=False)
    weights: Weights

    def ask(self, state, batch, inputs=(), layers=(), key=None):
        return _evaluate(self.network, self.weights, inputs, layers), state


class Ensemble(Teacher):
    """The weighted average of several networks' probabilities or logits."""

    networks: tuple[Network | nn.Module, ...] = flax.struct.field(pytree_node=False)
    members: tuple[Weights, ...]  # of `networks`
    shares: Array  # [members], in any unit
    average: str = flax.struct.field(pytree_node=False)  # "logit", or "probability"

    def ask(self, state, batch, inputs=(), layers=(), key=None):
        _refuse_layers("an ensemble has no layers of its own", layers)
        logits = jnp.stack(
            [
                _evaluate(network, weights, inputs).logits.astype(jnp.float32)
                for network, weights in zip(self.networks, self.members, strict=True)
            ]
        )
        shares = self.shares / jnp.sum(self.shares)
        if self.average == "logit":
            return Outputs(logits=jnp.tensordot(shares, logits, 1)), state
        # The logarithm of the mean probability is a logit of it.
        shares = shares.reshape(shares.shape + (1,) * (logits.ndim - 1))
        mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0, b=shares)
        return Outputs(logits=mean), state


class Stored(Teacher):
    """Logits computed before, which the batch carries: "teacher_logits", or sparse targets."""

    def ask(self, state, batch, inputs=(), layers=(), key=None):
        _refuse_layers("stored logits have no features", layers)
        return Outputs(logits=batch.get("teacher_logits")), state


class MovingAverage(Teacher):
    """The exponential moving average of the student's own weights (arXiv:1703.01780).

    After each step it is `decay` of what it was, plus the rest of what the student's weights are.
    Batch statistics are the student's own.
    """

    network: Network | nn.Module = flax.struct.field(pytree_node=False)
    decay: float = flax.struct.field(pytree_node=False)

    def init(self, params: Any, model_state: Any) -> TeacherState:
        return TeacherState(params=params, model_state=model_state)

    def ask(self, state, batch, inputs=(), layers=(), key=None):
        weights = Weights(variables=state.variables, qparams={})
        return _evaluate(self.network, weights, inputs, layers), state

    def update(self, state: TeacherState, params: Any, model_state: Any) -> TeacherState:
        mix = lambda mean, new: self.decay * mean + (1 - self.decay) * new
        average = jax.tree.map(mix, state.params, params)
        return state.replace(params=average, model_state=model_state)


class Peer(Teacher):
    """A network that is trained at once and learns from the student as the student does from it.

    (Deep mutual learning, arXiv:1706.00384.) It runs in training mode.
    """

    network: Network | nn.Module = flax.struct.field(pytree_node=False)
    start: Variables  # before the first step

    def init(self, params: Any, model_state: Any) -> TeacherState:
        others = {name: tree for name, tree in self.start.items() if name != "params"}
        return TeacherState(params=self.start["params"], model_state=others, learns=True)

    def ask(self, state, batch, inputs=(), layers=(), key=None):
        _refuse_layers("a peer is compared by its logits", layers)
        run = lambda rngs: capture.run(
            self.network,
            state.variables,
            {},
            inputs,
            train=True,
            mutable=list(state.model_state),
            rngs=rngs,
        )
        outputs, model_state = with_streams(run, key)
        return outputs, state.replace(model_state=model_state)


def _evaluate(
    network: Network | nn.Module,
    weights: Weights,
    inputs: tuple[Array, ...],
    layers: Collection[str] = (),
) -> Outputs:
    return capture.run(network, weights.variables, weights.qparams, inputs, layers)[0]


def _refuse_layers(why: str, layers: Collection[str]) -> None:
    if layers:
        raise ValueError(f"{why}, asked for {sorted(layers)}")
