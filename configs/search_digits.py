r"""Search for bit-widths on digits: nine searchers, three budgets, before and after training.

python launch/compress.py --config=configs/search_digits.py --workdir=runs/search_digits
python launch/search.py --config=configs/search_digits.py --workdir=runs/search_digits \
    --config.search.method=ddpg --config.search.most.average_bits=3.5

A few minutes per seed on two quiet cores.
"""

from ml_collections import ConfigDict

from kdq import config as kdq_config
from kdq.arms import kl, searched_arms
from kdq.config import arm, complete, parse_arg

METHODS = {
    **{
        method: {"method": method}
        for method in ("uniform", "random", "greedy", "knapsack", "knapsack_pairwise")
    },
    "knapsack_fisher": {"method": "knapsack", "sensitivity": "fisher"},
    "knapsack_hessian": {"method": "knapsack", "sensitivity": "hessian"},
    **{method: {"method": method} for method in ("nsga2", "tpe", "ddpg", "ppo")},
}
BUDGETS = {
    "2_5bit": {"most": {"average_bits": 2.5}},
    "3bit": {"most": {"average_bits": 3.0}},
    "4bit": {"most": {"average_bits": 4.0}},
}

MODELS = {
    "teacher": {
        "name": "cnn",
        "num_classes": 10,
        "widths": (32, 64, 128),
        "pool": True,
        "batch_norm": True,
    },
    "student": {"name": "cnn", "num_classes": 10, "widths": (8, 16, 16, 16)},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The experiment. `arg` is "quick" (a minute, numbers mean nothing) and/or "seeds=N"."""
    arg = parse_arg(arg, quick=False, seeds=0)
    config = ConfigDict(sort_keys=False)
    config.quick = arg.quick
    config.seeds = tuple(range(arg.seeds or (1 if arg.quick else 3)))
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
    config.quantize = {
        "keep": (),
        "keep_bits": 8,
        "calibration_examples": 512,
        "fixed_scales": ("conv_0/activations",),  # of the pixels
    }
    config.evaluations = 10
    config.checkpoint_seconds = 30.0
    config.distill = {"kd": kl(alpha=0.9, temperature=2.0)}
    longest, longer = (2.0, 1.0) if arg.quick else (60.0, 30.0)  # epochs
    taught = {"model": "student", "teacher": "teacher", "distill": "kd", "learning_rate": 1e-2}
    further = {**taught, "init": "kd", "epochs": longer / 3}
    shared = {
        "students": ("kd",),
        "teacher": "teacher",
        "evaluations": 120 if arg.quick else 400,
        "finetune": "qad_w3a8",
    }
    config.arms = ConfigDict(sort_keys=False)
    config.arms.teacher = arm(model="teacher", epochs=longer, learning_rate=2e-3)
    config.arms.kd = arm(epochs=longest, **taught)
    config.arms.qad_w3a8 = arm(bits="W3A8", **further)
    methods = {k: METHODS[k] for k in ("uniform", "knapsack")} if arg.quick else METHODS
    budgets = {"3bit": BUDGETS["3bit"]} if arg.quick else BUDGETS
    config.searches, arms = searched_arms(methods, budgets, shared=shared, trained=further)
    config.arms.update(arms)
    config.search = kdq_config.search(**shared, **BUDGETS["3bit"])
    return complete(config)
