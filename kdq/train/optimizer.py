"""The optimizer: Optax transformations whose rates are data, so that arms share a compiled step."""

import functools

import jax
import jax.numpy as jnp
import optax

from kdq import config as kdq_config
from kdq.types import Array

RULES = {"adam": optax.scale_by_adam, "sgd": lambda: optax.trace(decay=0.9, nesterov=True)}


_RATES = ("learning_rate", "steps", "warmup", "scale_rate", "weight_decay", "clip_norm")


def relative() -> optax.GradientTransformation:
    """Turns an update `u` of a parameter `p` into `p (exp(u) - 1)`: a step of `log p`.

    Scales of quantizers must stay positive, and those of 8-bit layers are a hundred times smaller
    than those of 2-bit layers; with a relative step one rate suits them all.
    """

    def update(updates, state, params):
        return jax.tree.map(lambda u, p: p * jnp.expm1(u), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@functools.cache
def _make(name: str, scale_rule: str, clips: bool) -> optax.GradientTransformation:
    """One object a rule, because the compiled step is keyed by it."""
    for key, rule in (("name", name), ("scale_rule", scale_rule)):
        if rule not in RULES:
            raise kdq_config.ConfigError(
                kdq_config.unknown(f"config.optimizer.{key}: optimizer", rule, RULES)
            )

    def label(trainable: dict) -> dict:
        """Labels the parts of `TrainState.trainable`: adapters and a peer are as the student."""
        name_field = lambda path, _: path[-1].key
        return {
            k: jax.tree.map_with_path(name_field, v) if k == "scales" else "params"
            for k, v in trainable.items()
        }

    def build(learning_rate, steps, warmup, scale_rate, weight_decay, clip_norm):
        def rate(count: Array) -> Array:
            progress = jnp.minimum((count + 0.5) / steps, 1.0)
            ramp = jnp.minimum(1.0, progress / jnp.maximum(warmup, 1e-9))
            return learning_rate * ramp * 0.5 * (1 + jnp.cos(jnp.pi * progress))

        matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        train = {
            "params": optax.chain(
                RULES[name](),
                optax.add_decayed_weights(weight_decay, mask=matrices),
                optax.scale_by_learning_rate(rate),
            ),
            "zero_point": optax.chain(
                RULES[scale_rule](),
                optax.scale_by_learning_rate(lambda count: scale_rate * rate(count)),
            ),
        }
        by_log = [relative()] if scale_rule == "adam" else []
        train["scale"] = optax.chain(train["zero_point"], *by_log)
        by_part = optax.partition(train, label)
        return optax.chain(optax.clip_by_global_norm(clip_norm), by_part) if clips else by_part

    return optax.inject_hyperparams(build)(**dict.fromkeys(_RATES, 1.0))


def make_optimizer(config: kdq_config.Optimizer) -> optax.GradientTransformation:
    """The optimizer of `TrainState.trainable`; start it with `init_optimizer`."""
    return _make(config.name, config.scale_rule, config.clip_norm > 0)


def init_optimizer(
    config: kdq_config.Optimizer, trainable: dict, *, learning_rate: float, steps: int
) -> optax.OptState:
    """Fresh state that holds the rates of one arm: cosine decay from `learning_rate` over `steps`.

    Quantizers train at `scale_rate` times the rate, by Adam with relative steps of their scales or
    by plain gradient descent.
    """
    rates = {**vars(config), "learning_rate": learning_rate, "steps": steps}
    rates = {name: jnp.float32(rates[name]) for name in _RATES}
    return optax.tree.set(make_optimizer(config).init(trainable), **rates)
