"""One small experiment with every kind of arm, whose records and packed bytes are pinned.

    python tests/golden/compare.py COMMIT

runs it at a commit and in this tree, on this machine, and wants equal bits. As a config file it
takes the kind of the teachers' cache: --config=tests/golden/every_arm.py:cache=top_k
"""

from ml_collections import ConfigDict

from kdq import config as kdq_config
from kdq.arms import kl
from kdq.config import arm, complete, parse_arg

# The terms that a recipe of that cache can have.
OF_CACHE = {"top_k": "top_k_kl", "sampled": "sampled_kl"}
FEATURES = {
    "hint": {"loss": "hint", "student": "conv_1", "teacher": "norm_1", "adapter": "linear"},
    "attention": {"loss": "attention_transfer", "student": "conv_1", "teacher": "norm_1"},
    "contrast": {
        "loss": "contrastive",
        "student": "conv_1",
        "teacher": "norm_1",
        "negatives": 32,
        "dim": 8,
        "weight": {"kind": "linear", "start": 0.0, "end": 0.5},
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the experiment; `arg` is "cache=" and one of the kinds of kdq.schema.Cache."""
    cache = parse_arg(arg, cache="memory").cache
    config = ConfigDict(sort_keys=False)
    config.seeds = (0,)
    config.data = {
        "name": "digits",
        "batch_size": 64,
        "eval_batch_size": 128,
        "mean": 4.9,
        "std": 6.0,
    }
    if cache != "memory":
        config.data.augment = ({"name": "shift", "pixels": 1},)
    config.models = {
        "teacher": {"name": "cnn", "num_classes": 10, "widths": (8, 8), "batch_norm": True},
        "student": {"name": "cnn", "num_classes": 10, "widths": (4, 6)},
    }
    config.quantize = {"keep": ("conv_0",), "calibration_examples": 128}
    config.evaluations = 2
    config.checkpoint_seconds = 0.0
    config.cache = {"kind": cache, "size": 4 if cache in OF_CACHE else 0, "temperature": 2.0}
    config.distill = {"kd": kl(alpha=0.7, temperature=2.0)}
    if cache in OF_CACHE:
        options = {"temperature": 2.0} if cache == "top_k" else {}
        config.distill.kd.terms = {"kl": {"loss": OF_CACHE[cache], "weight": 0.7, **options}}
    base = {"learning_rate": 1e-2, "epochs": 3.0}
    taught = {**base, "model": "student", "teacher": "teacher", "distill": "kd"}
    config.arms = ConfigDict(sort_keys=False)
    config.arms.teacher = arm(model="teacher", **base)
    config.arms.kd = arm(**taught)
    config.arms.qad = arm(**{**taught, "init": "kd", "bits": "W4A4", "epochs": 0.2})
    if cache == "memory":
        _every_arm(config, base, taught)
    return complete(config)


def _every_arm(config: ConfigDict, base: dict, taught: dict) -> None:
    student = {**base, "model": "student"}
    short = {"epochs": 0.5, "init": "student"}
    config.distill.features = {"task": 0.5, "terms": {**FEATURES, **config.distill.kd.terms}}
    config.distill.mutual = kl(alpha=0.5, temperature=1.0)
    config.teachers = {
        "both": {"kind": "ensemble", "arms": ("teacher", "student"), "weights": (3.0, 1.0)},
        "average": {"kind": "moving_average", "decay": 0.9},
        "peer": {"kind": "peer", "model": "student", "init": "student"},
        "moved": {"kind": "shuffled", "arm": "teacher"},
        "former": {"kind": "former_peer", "arm": "by_peer"},
    }
    config.ptq = {
        "folded": (
            {"method": "fold_batch_norm"},
            {"method": "equalize"},
            {"method": "gptq"},
            {"method": "bias_correction"},
        ),
        "rounded": ({"method": "adaround", "steps": 20},),
        "guided": ({"method": "teacher_guided", "scale_steps": 10, "rounding_steps": 10},),
    }
    config.qat = {
        "damped": {
            "method": "lsq",
            "least_bits": {"kind": "phases", "values": (8.0, 0.0), "starts": (0.0, 0.4)},
            "dampen": {"kind": "cosine", "start": 0.0, "end": 1e-3},
            "freeze": 0.02,
            "freeze_norm": 0.5,
        },
        "pact": {"method": "pact"},
        "stochastic": {"method": "stochastic"},
    }
    config.transfer = {"examples": 32, "pairs": 8}
    searched = {
        "students": ("kd",),
        "teacher": "teacher",
        "choices": ("W2A8", "W4A8", "W8A8"),
        "most": {"average_bits": 4.0},
        "evaluations": 12,
        "examples": 150,
    }
    config.searches = ConfigDict(sort_keys=False)
    config.searches.exact = kdq_config.search(method="knapsack", **searched)
    config.searches.tuned = kdq_config.search(
        method="random", **{**searched, "evaluations": 4, "finetune": "qad", "steps": 3}
    )
    arms = config.arms
    arms.student = arm(**student, label_smoothing=0.1)
    arms.without = arm(**student, without_classes=(3,), seed_offset=5, stop=2.0)
    arms.features = arm(**{**taught, "distill": "features"})
    arms.by_both = arm(**{**taught, "teacher": "both", "reference": "student"})
    arms.by_average = arm(**{**taught, "teacher": "average", "init": "student"})
    arms.by_peer = arm(**{**taught, "teacher": "peer", "distill": "mutual"})
    arms.by_former = arm(**{**taught, "teacher": "former"})
    arms.by_moved = arm(**{**taught, "teacher": "moved"})
    quantized = {"model": "student", "init": "student"}
    arms.ptq = arm(**quantized, bits="W4A4", observer="percentile", reference="student")
    arms.ptq_weights = arm(**quantized, bits="W3", observer="absmax")
    arms.ptq_folded = arm(model="teacher", init="teacher", bits="W4A8", ptq="folded")
    arms.ptq_rounded = arm(**quantized, bits="W3A8", ptq="rounded")
    arms.ptq_guided = arm(**quantized, bits="W3A8", ptq="guided", teacher="teacher")
    arms.qat = arm(**{**student, **short, "bits": "W4A4", "qat": "damped"})
    arms.qat_norm = arm(
        **{**base, "model": "teacher", "init": "teacher", "epochs": 0.2},
        bits="W4A4",
        qat="damped",
        reference="teacher",
    )
    arms.qat_pact = arm(**{**student, **short, "bits": "W3A3", "qat": "pact"})
    arms.qat_chance = arm(**{**student, **short, "bits": "W4A8", "qat": "stochastic"})
    arms.qad_features = arm(**{**taught, **short, "bits": "W2A4", "distill": "features"})
    arms.qad_average = arm(**{**taught, **short, "bits": "W4A4", "teacher": "average"})
    for name in config.searches:
        arms[f"{name}_ptq"] = arm(model="student", init="kd", bits=name)
        arms[f"{name}_qad"] = arm(**{**taught, "init": "kd", "bits": name, "epochs": 0.2})
    config.export = {
        "formats": ("onnx", "litert", "stablehlo"),
        "arms": ("qad", "qat_norm"),
        "examples": 64,
        "agreement": 0.9,
    }
