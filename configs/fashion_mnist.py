r"""Distill, quantize, or both, on Fashion-MNIST: the arms of digits.py at 28×28 pixels.

apt-get install dataset-fashion-mnist  # or any folder with the four IDX files
python launch/prepare_data.py --dataset=fashion_mnist --data_dir=data \
    --source=/usr/share/datasets/fashion-mnist
python launch/compress.py --config=configs/fashion_mnist.py --config.data.data_dir=data \
    --workdir=runs/fashion_mnist

About an hour per seed on two quiet cores, a third of it for the teacher.
"""

from ml_collections import ConfigDict

from kdq.arms import compression_arms, kl
from kdq.config import complete, parse_arg

MODELS = {
    "teacher": {
        "name": "resnet",
        "num_classes": 10,
        "depth": 8,
        "widths": (32, 32, 64, 128),
        "stem_pool": True,
    },
    "student": {"name": "cnn", "num_classes": 10, "widths": (8, 16, 32)},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The experiment. `arg` is "quick" (minutes, numbers mean nothing) and/or "seeds=N"."""
    arg = parse_arg(arg, quick=False, seeds=1)
    config = ConfigDict(sort_keys=False)
    config.quick = arg.quick
    config.seeds = tuple(range(arg.seeds))
    config.data = {
        "name": "fashion_mnist",
        "data_dir": "",
        "train": "train[:5%]" if arg.quick else "train[:54000]",
        "validation": "train[54000:]",
        "test": "test",
        "batch_size": 256,
        "eval_batch_size": 1000,
        "augment": ({"name": "flip"},),
        "mean": 72.9,  # of the training pixels, which go from 0 to 255
        "std": 90.0,
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
        "calibration_examples": 1000,
        "fixed_scales": ("conv_0/activations",),  # of the pixels
    }
    config.evaluations = 8
    config.checkpoint_seconds = 60.0
    config.distill = {"kd": kl(alpha=0.9, temperature=1.0)}
    scale = 0.2 if arg.quick else 1.0  # of the epochs
    config.arms = compression_arms(
        teacher={"epochs": 16.0 * scale, "learning_rate": 2e-3},
        student={"epochs": 10.0 * scale, "learning_rate": 1e-2},
        further={"epochs": 4.0 * scale, "learning_rate": 5e-3},
        distill="kd",
    )
    for name, fields in config.arms.items():
        # The teacher is large enough to overfit; the student is not, and learns from logits that
        # are computed once.
        fields.augment = name == "teacher"
    add_grid(config)
    return complete(config)


def add_grid(config: ConfigDict) -> None:
    """Adds the rest of the grid from which alpha and temperature were chosen, on validation."""
    for alpha in (0.5, 0.9):
        for temperature in (1.0, 2.0, 4.0):
            if (alpha, temperature) != (0.9, 1.0):
                recipe = f"kd_alpha{100 * alpha:.0f}_t{temperature:.0f}"
                config.distill[recipe] = kl(alpha=alpha, temperature=temperature)
                config.arms[recipe] = dict(config.arms.kd) | {"distill": recipe}
