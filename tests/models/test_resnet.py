"""The residual network: its pooled stem."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from kdq import models


def _first_block_input(model, variables, images):
    seen = []

    def look(next_method, args, kwargs, context):
        if context.module.name == "stage_0_block_0":
            seen.append(args[0])
        return next_method(*args, **kwargs)

    with nn.intercept_methods(look):
        model.apply(variables, images, train=False)
    return seen[0]


@pytest.mark.slow
def test_stem_pool_halves_what_the_blocks_see_and_adds_no_parameter():
    images = jax.random.normal(jax.random.key(0), (2, 12, 12, 1))
    build = lambda pool: models.build(
        "resnet", num_classes=3, depth=8, widths=(4, 4, 4, 4), stem_pool=pool
    )
    variables = jax.jit(build(False).init)(jax.random.key(1), images)
    whole = _first_block_input(build(False), variables, images)
    pooled = _first_block_input(build(True), variables, images)
    np.testing.assert_array_equal(pooled, nn.max_pool(whole, (2, 2), (2, 2)))
