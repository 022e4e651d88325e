r"""A comparison of all distillation methods with equal initialization, epochs, data and tuning.

python launch/compress.py --config=configs/distill_methods.py --workdir=runs/methods
python launch/compress.py --config=configs/distill_methods.py:tune --workdir=runs/methods_tune

On Fashion-MNIST (`:fashion`), with a short schedule on 10,000 images and one teacher, trained by
configs/fashion_mnist.py:

python launch/compress.py --config=configs/distill_methods.py:fashion --config.data.data_dir=data \
    --workdir=runs/methods_fashion \
    --config.arms.teacher.load=runs/fashion_mnist/teacher/0/model.safetensors

For each method the best of three weights was chosen on the validation split of digits, with
separate seeds (`:tune`); `WEIGHTS` are the chosen ones, which Fashion-MNIST uses too. Losses on
outputs are combined with a tenth of the label loss, losses on features with the full label loss.
The study does not measure what a method adds to plain KL.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from kdq.config import arm, complete, parse_arg

# Where features are compared: maps of equal size before the student's last layer or stage, and the
# last of both, averaged over positions.
LAYERS = {
    "digits": {  # 4×4 maps of 16 and of 128 channels
        "maps": {"student": "conv_1", "teacher": "norm_2"},
        "last": {"student": "conv_2", "teacher": "norm_2", "pool": True},
    },
    "fashion_mnist": {  # 7×7 maps of 32 and of 64 channels; the teacher's last are 4×4 of 128
        "maps": {"student": "conv_2", "teacher": "stage_1_block_0"},
        "last": {"student": "conv_2", "teacher": "stage_2_block_0", "pool": True},
    },
}

# The term without its weight, and the weight that its authors give or that makes it as large as the
# task's loss. Tuning tries a fifth, one and five times as much.
OUTPUTS = {
    "kl": ({"temperature": 2.0}, 0.9),
    "reverse_kl": ({"temperature": 2.0}, 0.9),
    "jensen_shannon": ({"temperature": 2.0, "beta": 0.5}, 2.0),
    "skew_kl": ({"temperature": 2.0, "alpha": 0.1}, 0.9),
    "dkd": ({"temperature": 2.0, "alpha": 1.0, "beta": 4.0}, 0.9),
    "dist": ({"temperature": 2.0}, 2.0),
    "standardized_kl": ({"temperature": 2.0}, 0.9),
    "soft_mse": ({}, 0.3),
    "hard_label": ({}, 0.9),
}
FEATURES = {
    "hint": ("maps", {}, 1.0),
    "attention_transfer": ("maps", {}, 500.0),
    "similarity_preserving": ("last", {}, 500.0),
    "relational_distance": ("last", {}, 5.0),
    "relational_angle": ("last", {}, 10.0),
    "variational_information": ("maps", {}, 1.0),
    "quantized_feature": ("maps", {"bits": 4}, 1.0),
    "contrastive": ("last", {"negatives": 256, "dim": 32}, 0.8),
    "info_nce": ("last", {"dim": 32}, 0.8),
}
FACTORS = {"low": 0.2, "mid": 1.0, "high": 5.0}
# Factors chosen on validation of digits; 1 where none is given.
WEIGHTS = {
    "kl": 5.0,
    "skew_kl": 5.0,
    "jensen_shannon": 5.0,
    "dkd": 0.2,
    "hard_label": 0.2,
    "hint": 0.2,
    "attention_transfer": 0.2,
    "similarity_preserving": 0.2,
    "relational_distance": 5.0,
    "relational_angle": 5.0,
    "quantized_feature": 5.0,
    "contrastive": 0.2,
}


def recipe(loss: str, factor: float, data: str) -> dict:
    """The entry of `config.distill` for a loss at a multiple of its usual weight."""
    if loss in OUTPUTS:
        fields, weight = OUTPUTS[loss]
    else:
        layers, fields, weight = FEATURES[loss]
        fields = {**LAYERS[data][layers], **fields}
    term = {"loss": loss, **fields, "weight": factor * weight}
    return {"task": 0.1 if loss in OUTPUTS else 1.0, "terms": {loss: term}}


def get_config(argument: str | None = None) -> ConfigDict:
    """The comparison. `argument` is any of "fashion", "tune" and "seeds=N"."""
    argument = parse_arg(argument, fashion=False, tune=False, seeds=0)
    data = "fashion_mnist" if argument.fashion else "digits"
    path = Path(__file__).with_name(f"{data}.py")
    config = runpy.run_path(str(path))["get_config"]()
    default = {"digits": (5, 3), "fashion_mnist": (3, 1)}[data][argument.tune]
    seeds = argument.seeds or default
    config.seeds = tuple(range(100, 100 + seeds) if argument.tune else range(seeds))
    config.transfer = {"examples": 0 if argument.tune else 256}
    config.distill = ConfigDict(sort_keys=False)
    teacher, fields = dict(config.arms.teacher), dict(config.arms.student)
    if argument.fashion:
        config.data.train, config.data.batch_size = "train[:10000]", 64
        teacher["epochs"], fields["epochs"], config.evaluations = 0.0, 4.0, 4
    arms = {"teacher": teacher, "student": fields}
    for loss in (*OUTPUTS, *FEATURES):
        chosen = {"": WEIGHTS.get(loss, 1.0)}
        for label, factor in (FACTORS if argument.tune else chosen).items():
            name = f"{loss}_{label}" if label else loss
            config.distill[name] = recipe(loss, factor, data)
            taught = {"teacher": "teacher", "distill": name}
            reference = "" if argument.tune else "student" if loss == "kl" else "kl"
            arms[name] = arm(**{**fields, **taught, "reference": reference})
    config.arms = ConfigDict(arms, sort_keys=False)
    return complete(config)
