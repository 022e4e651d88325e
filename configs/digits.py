"""Distill, quantize, or both, on scikit-learn's digits: a full experiment in minutes on a CPU.

python launch/compress.py --config=configs/digits.py --workdir=runs/digits
python launch/compress.py --config=configs/digits.py:quick --workdir=runs/quick
python launch/compress.py --config=configs/digits.py:seeds=10 --workdir=runs/digits10
"""

from ml_collections import ConfigDict

from kdq.arms import compression_arms, kl
from kdq.config import complete, parse_arg

MODELS = {
    "teacher": {
        "name": "cnn",
        "num_classes": 10,
        "widths": (32, 64, 128),
        "pool": True,
        "batch_norm": True,
    },
    "student": {"name": "cnn", "num_classes": 10, "widths": (8, 16, 16)},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The experiment. `arg` is "quick" (seconds, numbers mean nothing) and/or "seeds=N"."""
    arg = parse_arg(arg, quick=False, seeds=0)
    config = ConfigDict(sort_keys=False)
    config.quick = arg.quick
    config.seeds = tuple(range(arg.seeds or (1 if arg.quick else 5)))
    config.data = {
        "name": "digits",
        "data_dir": "",
        "train": "train",
        "validation": "validation",
        "test": "test",
        "batch_size": 64,
        "eval_batch_size": 512,
        "augment": (),
        "mean": 4.9,  # of the training pixels, which go from 0 to 16
        "std": 6.0,
    }
    config.models = MODELS
    config.teacher = "teacher"
    config.optimizer = {
        "name": "adam",
        "warmup": 0.05,
        "scale_rate": 0.1,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
    }
    config.quantize = {
        "keep": ("conv_0", "head"),
        "keep_bits": 8,
        "calibration_examples": 512,
        "fixed_scales": ("conv_0/activations",),  # of the pixels
    }
    config.evaluations = 20
    config.checkpoint_seconds = 30.0
    config.distill = {"kd": kl(alpha=0.9, temperature=2.0)}

    longest, longer = (2.0, 1.0) if arg.quick else (60.0, 30.0)  # epochs
    # Rates, alpha and temperature: the best on validation in digits_tuning.py.
    config.arms = compression_arms(
        teacher={"epochs": longer, "learning_rate": 2e-3},
        student={"epochs": longest, "learning_rate": 1e-2},
        further={"epochs": longer, "learning_rate": 1e-2},
        distill="kd",
    )
    return complete(config)
