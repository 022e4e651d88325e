"""Types of what a config may set of a loss, with their limits (`kdq.distill.term`).

The losses themselves take traced numbers, which nothing can check.
"""

from typing import Annotated

from kdq.fields import Limits
from kdq.schema import COLD, HEAVIEST, HOT
from kdq.types import Array

Scalar = Array | float
Temperature = Annotated[Scalar, Limits(at_least=COLD, at_most=HOT)]
Share = Annotated[Scalar, Limits(at_least=0, at_most=1)]
Weight = Annotated[Scalar, Limits(at_least=0, at_most=HEAVIEST)]
Momentum = Annotated[Scalar, Limits(at_least=0, below=1)]
Power = Annotated[Scalar, Limits(above=0, at_most=100)]
Variance = Annotated[Scalar, Limits(at_least=1e-30, at_most=HEAVIEST)]
Bits = Annotated[Scalar, Limits(at_least=1, at_most=8)]
Count = Annotated[int, Limits(at_least=1, at_most=2**31 - 1)]
Chunk = Annotated[int | None, Limits(at_least=1)]
