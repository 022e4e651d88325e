"""Distill, quantize, or both, for a regression task: scikit-learn's diabetes data.

python launch/compress.py --config=configs/diabetes.py --workdir=runs/diabetes
python launch/compress.py --config=configs/diabetes.py:quick --workdir=runs/quick
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
    config.task = {"name": "regression"}
    config.data = {
        "name": "diabetes",
        "batch_size": 32,
        "eval_batch_size": 128,
        "mean": 0.0,  # columns are standardized by the training split
        "std": 1.0,
    }
    config.models = {
        "teacher": {"name": "mlp", "num_classes": 1, "widths": (64, 64)},
        "student": {"name": "mlp", "num_classes": 1, "widths": (8, 8)},
    }
    config.optimizer = {"weight_decay": 0.01}
    config.quantize = {
        "keep": ("dense_0", "head"),
        "calibration_examples": 256,
        "fixed_scales": ("dense_0/activations",),  # of the measurements
    }
    config.distill = {
        "kd": recipe("squared_error", alpha=0.9),
        "bounded": recipe("teacher_bounded", alpha=0.9, margin=0.0),
    }
    longest, longer = (3.0, 2.0) if arg.quick else (60.0, 30.0)  # epochs
    base = {"epochs": longest, "learning_rate": 3e-3}
    student = {**base, "model": "student"}
    further = {**student, "epochs": longer}
    taught = {"teacher": "teacher", "distill": "kd"}
    arms = config.arms = ConfigDict(sort_keys=False)
    arms.teacher = arm_(model="teacher", **base)
    arms.student = arm_(**student)
    arms.kd = arm_(**student, **taught, reference="student")
    arms.kd_bounded = arm_(**student, teacher="teacher", distill="bounded", reference="student")
    arms.update(quantized_arms(("W8A8", "W4A4"), further=further, taught=taught))
    return complete(config)
