"""Distill, quantize, or both, for a multi-label task: which digits an image of two contains.

python launch/compress.py --config=configs/digit_pairs.py --workdir=runs/digit_pairs
python launch/compress.py --config=configs/digit_pairs.py:quick --workdir=runs/quick
"""

from ml_collections import ConfigDict

from kdq.arms import quantized_arms, recipe
from kdq.config import arm as arm_
from kdq.config import complete, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The experiment. `arg` is "quick" (seconds, numbers mean nothing) and/or "seeds=N"."""
    arg = parse_arg(arg, quick=False, seeds=0)
    config = ConfigDict(sort_keys=False)
    config.quick = arg.quick
    config.seeds = tuple(range(arg.seeds or (1 if arg.quick else 5)))
    config.task = {"name": "multilabel"}
    config.data = {
        "name": "digit_pairs",
        "batch_size": 64,
        "eval_batch_size": 512,
        "mean": 4.9,  # of the training pixels, which go from 0 to 16
        "std": 6.0,
    }
    config.models = {
        "teacher": {"name": "cnn", "num_classes": 10, "widths": (32, 64), "batch_norm": True},
        "student": {"name": "cnn", "num_classes": 10, "widths": (8, 16)},
    }
    config.quantize = {
        "keep": ("conv_0", "head"),
        "calibration_examples": 512,
        "fixed_scales": ("conv_0/activations",),  # of the pixels
    }
    config.distill = {"kd": recipe("bernoulli_kl", alpha=0.9, temperature=2.0)}
    longest, longer = (0.5, 0.3) if arg.quick else (20.0, 10.0)  # epochs
    student = {"model": "student", "epochs": longest, "learning_rate": 5e-3}
    further = {**student, "epochs": longer}
    taught = {"teacher": "teacher", "distill": "kd"}
    arms = config.arms = ConfigDict(sort_keys=False)
    arms.teacher = arm_(model="teacher", epochs=longest, learning_rate=2e-3)
    arms.student = arm_(**student)
    arms.kd = arm_(**student, **taught, reference="student")
    arms.update(quantized_arms(("W8A8", "W4A4"), further=further, taught=taught))
    return complete(config)
