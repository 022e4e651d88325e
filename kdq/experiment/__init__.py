"""An experiment: named arms over the same data, splits and seeds.

Every arm goes one way: fresh weights or another arm's, calibrated if it is quantized, trained if it
has epochs, selected on validation, packed, loaded back, and measured on test. Its folder
`WORKDIR/ARM/SEED` holds `model.safetensors`, `result.json`, `details.json`, `metrics.jsonl` and
`checkpoints/`.
"""

from kdq.experiment.adding import arms_of_search, cost_table, finished, with_search
from kdq.experiment.exports import export_arm as export
from kdq.experiment.profiling import Profile, profile
from kdq.experiment.progress import Progress, Unit
from kdq.experiment.runner import run
from kdq.record import ArmRecord

__all__ = [
    "ArmRecord",
    "Profile",
    "Progress",
    "Unit",
    "arms_of_search",
    "cost_table",
    "export",
    "finished",
    "profile",
    "run",
    "with_search",
]
