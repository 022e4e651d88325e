r"""Hinton's experiment at a small scale: what a student learns about a class it was never shown.

python launch/compress.py --config=configs/withheld_class.py --workdir=runs/withheld

As in arXiv:1503.02531, §3, the examples of one class are removed from the students' training data,
but not from the teacher's. A student trained on labels cannot know the class; the teacher's
softened probabilities for the other classes contain information about it. Each record has
`accuracy_by_class` and, with the bias of the class chosen on validation, `accuracy_corrected` and
`accuracy_by_class_corrected`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from kdq.arms import kl
from kdq.config import arm, complete, parse_arg

WITHHELD = 3


def get_config(argument: str | None = None) -> ConfigDict:
    """The experiment. `argument` is "seeds=N"."""
    argument = parse_arg(argument, seeds=5)
    path = Path(__file__).with_name("digits.py")
    config = runpy.run_path(str(path))["get_config"](f"seeds={argument.seeds}")
    student = dict(config.arms.student)
    arms = {
        "teacher": dict(config.arms.teacher),
        "student": student,
        "labels_without": {**student, "without_classes": (WITHHELD,), "reference": "student"},
    }
    config.distill = ConfigDict(sort_keys=False)
    for temperature in (1.0, 4.0, 8.0):
        name = f"kd_t{temperature:.0f}"
        # No labels at all: a term that says "none of these is a 3" would teach just that.
        config.distill[name] = kl(alpha=1.0, temperature=temperature)
        taught = {**student, "teacher": "teacher", "distill": name}
        arms[name] = arm(**{**taught, "reference": "student"})
        arms[f"{name}_without"] = arm(
            **{**taught, "without_classes": (WITHHELD,), "reference": name}
        )
    config.arms = ConfigDict(arms, sort_keys=False)
    return complete(config)
