"""The optimizer: Optax transformations whose rates are data, so that arms share a compiled step."""

import functools

import jax
import jax.numpy as jnp
import optax

from kdq import config as kdq_config
from kdq.types import Array


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam()


def _sgd() -> optax.GradientTransformation:
    return optax.trace(decay=0.9, nesterov=True)


RULES = {"adam": _adam, "sgd": _sgd}


def relative() -> optax.GradientTransformation:
    """Turns an update `u` of a parameter `p` into `p (exp(u) - 1)`: a step of `log p`.

    Scales of quantizers must stay positive, and those of 8-bit layers are a hundred times smaller
    than those of 2-bit layers; with a relative step one rate suits them all.
    """

    def update(updates, state, params):
        return jax.tree.map(lambda u, p: p * jnp.expm1(u), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _labels(trainable: dict) -> dict:
    """Labels the parts of `TrainState.trainable`; adapters and a peer train as the student does."""
    name_field = lambda path, _: path[-1].key
    return {
        k: jax.tree.map_with_path(name_field, v) if k == "scales" else "params"
        for k, v in trainable.items()
    }


@functools.cache
def _make(name: str, scale_rule: str, clips: bool) -> optax.GradientTransformation:
    """One object a rule, because the compiled step is keyed by it."""
    for key, rule in (("name", name), ("scale_rule", scale_rule)):
        if rule not in RULES:
            raise kdq_config.ConfigError(
                kdq_config.unknown(f"config.optimizer.{key}: optimizer", rule, RULES)
            )

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
        by_part = optax.partition(train, _labels)
        return optax.chain(optax.clip_by_global_norm(clip_norm), by_part) if clips else by_part

    zeros = dict.fromkeys(
        ("learning_rate", "steps", "warmup", "scale_rate", "weight_decay", "clip_norm"), 1.0
    )
    return optax.inject_hyperparams(build)(**zeros)


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
    return optax.tree.set(
        make_optimizer(config).init(trainable),
        learning_rate=jnp.float32(learning_rate),
        steps=jnp.float32(steps),
        warmup=jnp.float32(config.warmup),
        scale_rate=jnp.float32(config.scale_rate),
        weight_decay=jnp.float32(config.weight_decay),
        clip_norm=jnp.float32(config.clip_norm),
    )
