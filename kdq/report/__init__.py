"""Records of runs become tables and plots; nothing here computes a metric or trains a model.

A record is the dict that one arm and seed wrote: "arm", "seed", "status" ("ok" or "failed", then
with "error"), what the arm is ("kind", "bits", "params", "reference", "selected_on"), what was
measured ("accuracy" in [0, 1], "nll" and "kl_to_teacher" in nats, "size_bytes", "bops",
"train_seconds", ...), and where it came from ("config_digest", "commit", "versions", "device").
"""

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
