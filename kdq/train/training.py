"""What there is to train."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import grain
import optax

from kdq.distill.teacher import Peer, Teacher
from kdq.quantize.network import Weights
from kdq.schema import AT_ONCE, Compute
from kdq.train.objective import Objective
from kdq.train.regime import Regime
from kdq.train.sharding import ONE_DEVICE, Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, by whom, on what. `teacher` and the state's quantizers are optional."""

    model: nn.Module
    optimizer: optax.GradientTransformation
    objective: Objective
    dataset: grain.MapDataset  # endless; element i is the batch of step i, or this process's rows
    steps: int
    eval_every: int
    validate: Callable[[Weights], dict[str, float]]  # -> "accuracy" and "nll" on validation
    teacher: Teacher | Peer | None = None
    teacher_arguments: Any = None
    regime: Regime | None = None
    freeze_norm_at: float = math.inf  # step from which on batch norm keeps its statistics
    layout: Layout = ONE_DEVICE  # where the arrays are, those that `validate` gets as well
    compute: Compute = AT_ONCE  # how a step is computed
