"""The random streams of a model in training: "dropout", and any other that its modules ask for."""

import re
import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
from flax.errors import InvalidRngError

from kdq.types import Array

T = TypeVar("T")
# Flax's words; nothing else of the error says which stream there is none of.
_MISSING = re.compile(r'needs PRNG for "([^"]*)"')


def with_streams(forward: Callable[[dict[str, Array]], T], key: Array) -> T:
    """Returns `forward(rngs)`, with a key for every stream that the model asks `make_rng` for.

    "dropout" gets `key`; each other the key folded in with its name, so that a stream's numbers
    depend on the step (which `key` is of) and on its name alone.

    Args:
      forward: traces or runs a model with `rngs`; again for each stream that was missing.
      key: random, of one step.

    Raises:
      InvalidRngError: a stream that is there does not reach the module: a lifted transform
        (`nn.scan`, `nn.vmap`) needs it in its `split_rngs`.
    """
    rngs = {"dropout": key}
    while True:
        try:
            return forward(dict(rngs))
        except InvalidRngError as error:
            missing = _MISSING.search(str(error))
            if missing is None or missing[1] in rngs:
                raise
            rngs[missing[1]] = jax.random.fold_in(key, zlib.crc32(missing[1].encode()))
