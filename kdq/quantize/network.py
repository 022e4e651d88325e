"""A network as everything in kdq takes it: a module with how it is called, and its weights."""

import dataclasses

import jax

from kdq.types import QParams, Variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The arrays a network computes with: float variables and quantizers ({} for none)."""

    variables: Variables
    qparams: QParams
