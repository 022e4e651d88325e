"""Rematerialization: what the forward pass computed is forgotten, and computed again for the
backward pass, in chosen modules of any Linen model."""

import contextlib
import re
from collections.abc import Iterator

import flax.linen as nn


@contextlib.contextmanager
def rematerialized(pattern: str) -> Iterator[None]:
    """Modules applied in this context whose path matches keep their inputs only.

    Activations of a block then take memory only while its gradient is computed, for one more
    forward pass (arXiv:1604.06174). On CPUs XLA sees through it and keeps them after all.

    Args:
      pattern: of "/"-joined module paths, all of a path; within a module that matches, others are
        part of it. "" is none.
    """
    if not pattern:
        yield
        return
    inside: list[str] = []

    def intercept(next_fun, args, kwargs, context):
        path = "/".join(context.module.path)
        if inside or context.method_name != "__call__" or not re.fullmatch(pattern, path):
            return next_fun(*args, **kwargs)

        def call(module, *args):
            inside.append(path)
            try:
                return module(*args, **kwargs)
            finally:
                inside.pop()

        return nn.remat(call)(context.module, *args)

    with nn.intercept_methods(intercept):
        yield
