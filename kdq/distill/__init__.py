"""Distillation: losses, what they compare, and who teaches; docs/distillation.md is the guide.

`losses` are of logits and `features` of layers, both pure and per example. A `Term` is one of them
with its weight, the layers it looks at and an adapter (`term`, `methods`, `schedule`, `adapters`,
`capture`). `teacher` has what can teach, `cache` what it said, stored.
"""

from kdq.distill import features, losses
from kdq.distill.chunked import chunked_kl

__all__ = ["chunked_kl", "features", "losses"]
