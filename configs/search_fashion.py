r"""Search for bit-widths on Fashion-MNIST, for a ResNet student, before and after QAD.

apt-get install dataset-fashion-mnist  # or any folder with the four IDX files
python launch/prepare_data.py --dataset=fashion_mnist --data_dir=data \
    --source=/usr/share/datasets/fashion-mnist
python launch/compress.py --config=configs/search_fashion.py --config.data.data_dir=data \
    --workdir=runs/search_fashion

About half an hour per seed on two quiet cores. It measures latencies, so nothing else should run.
"""

from ml_collections import ConfigDict

from kdq import config as kdq_config
from kdq.arms import kl, searched_arms
from kdq.config import arm, complete, parse_arg

METHODS = {
    **{method: {"method": method} for method in ("uniform", "random", "greedy", "knapsack")},
    "knapsack_fisher": {"method": "knapsack", "sensitivity": "fisher"},
    **{method: {"method": method} for method in ("nsga2", "tpe", "ddpg", "ppo")},
}
BUDGETS = {
    "2_5bit": {"most": {"average_bits": 2.5}},
    "3bit": {"most": {"average_bits": 3.0}},
    "4bit": {"most": {"average_bits": 4.0}},
    "fast": {"most": {"average_bits": 4.0}, "share": {"latency": 0.95}},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The experiment. `arg` is "quick" (minutes, numbers mean nothing) and/or "seeds=N"."""
    arg = parse_arg(arg, quick=False, seeds=0)
    config = ConfigDict(sort_keys=False)
    config.quick = arg.quick
    config.seeds = tuple(range(arg.seeds or (1 if arg.quick else 3)))
    config.data = {
        "name": "fashion_mnist",
        "data_dir": "",
        "train": "train[:5%]" if arg.quick else "train[:54000]",
        "validation": "train[54000:]",
        "test": "test",
        "batch_size": 256,
        "eval_batch_size": 1000,
        "augment": (),
        "mean": 72.9,  # of the training pixels, which go from 0 to 255
        "std": 90.0,
    }
    resnet = {"name": "resnet", "num_classes": 10, "depth": 8, "stem_pool": True}
    config.models = {
        "teacher": {**resnet, "widths": (16, 32, 64, 128)},
        "student": {**resnet, "widths": (8, 8, 16, 32)},
    }
    config.teacher = "teacher"
    config.quantize = {
        "keep": (),
        "keep_bits": 8,
        "calibration_examples": 512,
        "fixed_scales": ("stem/activations",),  # of the pixels
    }
    config.evaluations = 4
    config.checkpoint_seconds = 60.0
    config.distill = {"kd": kl(alpha=0.9, temperature=2.0)}
    scale = 0.2 if arg.quick else 1.0  # of the epochs
    taught = {"model": "student", "teacher": "teacher", "distill": "kd"}
    further = {**taught, "init": "kd", "epochs": 0.25 * scale, "learning_rate": 2e-3}
    shared = {
        "students": ("kd",),
        "teacher": "teacher",
        "evaluations": 150,
        "finetune": "qad_w3a8",
    }
    config.arms = ConfigDict(sort_keys=False)
    config.arms.teacher = arm(model="teacher", epochs=5.0 * scale, learning_rate=2e-3)
    config.arms.kd = arm(**taught, epochs=6.0 * scale, learning_rate=5e-3)
    config.arms.qad_w3a8 = arm(bits="W3A8", **further)
    methods = {k: METHODS[k] for k in ("uniform", "knapsack")} if arg.quick else METHODS
    config.searches, arms = searched_arms(methods, BUDGETS, shared=shared, trained=further)
    config.arms.update(arms)
    config.search = kdq_config.search(**shared, **BUDGETS["3bit"])
    return complete(config)
