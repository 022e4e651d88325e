"""Small networks of every family, for the tests of this folder."""

import jax
import jax.numpy as jnp
import numpy as np

from kdq import models, quantize
from kdq.deploy import lower
from kdq.quantize.network import Weights

NETWORKS = {
    "mlp": {"name": "mlp", "widths": (32, 16)},
    "cnn": {"name": "cnn", "widths": (4, 6, 6)},
    "pooled": {"name": "cnn", "widths": (4, 6, 6), "pool": True, "batch_norm": True},
    "resnet": {"name": "resnet", "depth": 8, "widths": (4, 4, 6, 8)},
    "vit": {"name": "vit", "width": 16, "depth": 1, "heads": 2},
}


def network(name, offsets=0.0):
    """`(model, variables, images)` whose batch norms multiply, some by less than 0.

    Without offsets: a sum rounds them to its own steps, which may move a code.
    """
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(64, 8, 8, 1)), jnp.float32)
    model = models.build(**NETWORKS[name], num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    draw = lambda low, high: lambda a: jnp.asarray(rng.uniform(low, high, a.shape), a.dtype)
    if "batch_stats" in variables:

        def drawn(keys, a):
            name = jax.tree_util.keystr(keys)
            if "var" in name:
                return draw(0.5, 1.5)(a)
            if "norm" in name:
                return draw(-1.5, 1.5)(a) if "scale" in name else draw(-offsets, offsets)(a)
            return a

        variables = jax.tree_util.tree_map_with_path(drawn, variables)
    return model, variables, images


def lowered(model, variables, images, rules):
    """`(integer model, qparams)`."""
    qparams = quantize.calibrate(model, variables, rules, [images], check=False)
    return lower(model, Weights(variables=variables, qparams=qparams), images), qparams
