r"""Does a better teacher make a better student? Teacher size, stopping epoch and temperature.

python launch/compress.py --config=configs/teacher_quality.py --workdir=runs/teacher_quality

All teachers follow the schedule of the longest training and are stopped along it (arXiv:1910.01348
found that a teacher stopped early may teach a small student better). `kd_SIZE_STOP_tT` is taught by
`teacher_SIZE_STOP`. Fidelity is measured against the largest, fully trained teacher; the agreement
of a student with its teacher is in its training curve.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from kdq.arms import kl
from kdq.config import arm, complete, parse_arg

SIZES = {"small": (8, 16, 32), "middle": (16, 32, 64), "large": (32, 64, 128)}
STOPS = {"early": 3.0, "half": 10.0, "full": 0.0}  # epochs, of 30
TEMPERATURES = (1.0, 4.0)


def get_config(argument: str | None = None) -> ConfigDict:
    """The study. `argument` is "seeds=N"."""
    argument = parse_arg(argument, seeds=5)
    path = Path(__file__).with_name("digits.py")
    config = runpy.run_path(str(path))["get_config"](f"seeds={argument.seeds}")
    teacher, student = dict(config.arms.teacher), dict(config.arms.student)
    config.teacher = "teacher_large_full"
    arms, taught = {}, {}
    config.distill = {f"t{t:.0f}": kl(alpha=0.9, temperature=t) for t in TEMPERATURES}
    for size, widths in SIZES.items():
        key = f"teacher_{size}"
        config.models[key] = {**config.models.teacher.to_dict(), "widths": widths}
        for label, stop in STOPS.items():
            name = f"{key}_{label}"
            arms[name] = arm(**{**teacher, "model": key, "stop": stop})
            for temperature in TEMPERATURES:
                recipe = f"t{temperature:.0f}"
                fields = {**student, "teacher": name, "distill": recipe, "reference": "student"}
                taught[f"kd_{size}_{label}_{recipe}"] = arm(**fields)
    config.arms = ConfigDict({**arms, "student": student, **taught}, sort_keys=False)
    return complete(config)
