r"""Every way to distill, on equal terms: initialization, epochs, data, and trials to tune it.

python launch/compress.py --config=configs/distill_methods.py --workdir=runs/methods
python launch/compress.py --config=configs/distill_methods.py:tune --workdir=runs/methods_tune

Each method had three weights to choose from, on the validation split and with seeds of their own
(`:tune`); `WEIGHTS` are the best. Losses on outputs have a tenth of the labels' loss beside them,
losses on features all of it; what a method adds to plain KL is another question.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from kdq.config import arm, parse_arg

# The last maps of equal size, 4×4: the student's second of three convolutions has 16 channels, the
# teacher's last 128.
MAPS = {"student": "conv_1", "teacher": "norm_2"}
LAST = {"student": "conv_2", "teacher": "norm_2", "pool": True}

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
    "hint": (MAPS, 1.0),
    "attention_transfer": (MAPS, 500.0),
    "similarity_preserving": (LAST, 500.0),
    "relational_distance": (LAST, 5.0),
    "relational_angle": (LAST, 10.0),
    "variational_information": (MAPS, 1.0),
    "quantized_feature": ({**MAPS, "bits": 4}, 1.0),
    "contrastive": ({**LAST, "negatives": 256, "dim": 32}, 0.8),
    "info_nce": ({**LAST, "dim": 32}, 0.8),
}
FACTORS = {"low": 0.2, "mid": 1.0, "high": 5.0}
WEIGHTS: dict[str, float] = {}  # factors chosen on validation; 1 where none is given


def recipe(loss: str, factor: float) -> dict:
    """The entry of `config.distill` for a loss at a multiple of its usual weight."""
    fields, weight = {**OUTPUTS, **FEATURES}[loss]
    term = {"loss": loss, **fields, "weight": factor * weight}
    return {"task": 0.1 if loss in OUTPUTS else 1.0, "terms": {loss: term}}


def get_config(argument: str | None = None) -> ConfigDict:
    """The comparison. `argument` is "tune" or "seeds=N"."""
    argument = parse_arg(argument, tune=False, seeds=5)
    path = Path(__file__).with_name("digits.py")
    config = runpy.run_path(str(path))["get_config"]()
    config.seeds = tuple(range(100, 103)) if argument.tune else tuple(range(argument.seeds))
    config.transfer = {"examples": 0 if argument.tune else 256}
    config.distill = ConfigDict(sort_keys=False)
    fields = dict(config.arms.student)
    arms = {"teacher": dict(config.arms.teacher), "student": fields}
    for loss in (*OUTPUTS, *FEATURES):
        chosen = {"": WEIGHTS.get(loss, 1.0)}
        for label, factor in (FACTORS if argument.tune else chosen).items():
            name = f"{loss}_{label}" if label else loss
            config.distill[name] = recipe(loss, factor)
            own = {"teacher": "teacher", "distill": name}
            reference = "" if argument.tune else "student" if loss == "kl" else "kl"
            arms[name] = arm(**{**fields, **own, "reference": reference})
    config.arms = ConfigDict(arms, sort_keys=False)
    return config
