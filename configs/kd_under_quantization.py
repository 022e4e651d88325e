r"""Does the teacher matter more at fewer bits, and does it have to be this teacher?

python launch/compress.py --config=configs/kd_under_quantization.py --workdir=runs/kd_bits

At each bit-width, from the same start and for the same number of steps, the student is trained with
labels (`qat`), with the teacher (`qad`), and with two controls: an independent teacher with equal
training (`other`), and the teacher's logits moved to another example of the class (`shuffled`).
Fidelity is measured against the teacher. What the student of the other teacher has in common with
it was therefore not transferred by it.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from kdq.config import arm, complete, parse_arg

WIDTHS = ("", "W8A8", "W4A4", "W3A3", "W2A2", "W1A2")


def get_config(argument: str | None = None) -> ConfigDict:
    """The study. `argument` is "seeds=N"."""
    argument = parse_arg(argument, seeds=10)
    path = Path(__file__).with_name("digits.py")
    config = runpy.run_path(str(path))["get_config"](f"seeds={argument.seeds}")
    teacher, student = dict(config.arms.teacher), dict(config.arms.student)
    further = dict(config.arms.qat_w4a4)
    config.teachers = {"shuffled": {"kind": "shuffled", "arm": "teacher"}}
    config.transfer = {"examples": 256}
    arms = {
        "teacher": teacher,
        "teacher_other": arm(**{**teacher, "seed_offset": 1000, "reference": "teacher"}),
        "student": student,
    }
    for bits in WIDTHS:
        suffix = bits.lower() or "fp32"
        base = {**further, "bits": bits, "reference": "student"}
        arms[f"qat_{suffix}"] = arm(**base)
        for name, taught_by in (
            ("qad", "teacher"),
            ("other", "teacher_other"),
            ("shuffled", "shuffled"),
        ):
            taught = {"teacher": taught_by, "distill": "kd", "reference": f"qat_{suffix}"}
            arms[f"{name}_{suffix}"] = arm(**{**base, **taught})
    config.arms = ConfigDict(arms, sort_keys=False)
    return complete(config)
