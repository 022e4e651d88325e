r"""Four networks at four bit-widths, exported and timed in their runtimes, on Fashion-MNIST.

python launch/compress.py --config=configs/deployment.py --config.data.data_dir=data \
    --workdir=runs/deployment

Half an hour on two quiet cores; because it measures latencies, nothing else should run on the
machine. Training is short, since the subject is the exported files; for accuracy see
`configs/fashion_mnist.py`.
"""

from ml_collections import ConfigDict

from kdq.config import arm, complete, export, parse_arg

MODELS = {
    "mlp": {"name": "mlp", "widths": (1024, 1024)},
    "cnn": {"name": "cnn", "widths": (32, 64, 128)},
    "resnet": {"name": "resnet", "depth": 8, "widths": (16, 16, 32, 64)},
    "vit": {"name": "vit", "width": 64, "depth": 2},
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
        "train": "train[:2%]" if arg.quick else "train[:54000]",
        "validation": "train[54000:]",
        "test": "test",
        "batch_size": 256,
        "eval_batch_size": 1000,
        "augment": (),
        "mean": 72.9,  # of the training pixels, which go from 0 to 255
        "std": 90.0,
    }
    config.models = {key: {**fields, "num_classes": 10} for key, fields in MODELS.items()}
    config.teacher = "mlp"
    config.quantize = {
        "keep": ("head",),
        "keep_bits": 8,
        "calibration_examples": 1000,
        "fixed_scales": (),
    }
    config.export = export(
        formats=("onnx", "litert", "stablehlo"),
        agreement=0.98,  # LiteRT rounds sums in its own way, which moves codes of 4 bits
        latency_batches=(1, 64),
        threads=1,  # the work on one example is too little for more
    )
    config.evaluations = 4
    config.checkpoint_seconds = 60.0
    config.arms = ConfigDict(sort_keys=False)
    for model in MODELS:
        epochs = 2.0 if model in ("mlp", "cnn") else 1.0
        config.arms[model] = arm(model=model, epochs=epochs, learning_rate=2e-3)
        for bits in ("W8A8", "W4A8"):
            name = f"{model}_{bits.lower()}"
            config.arms[name] = arm(model=model, init=model, bits=bits, reference=model)
        for bits in ("W4A4", "W2A8"):
            config.arms[f"{model}_{bits.lower()}"] = arm(
                model=model,
                init=model,
                bits=bits,
                epochs=epochs / 4,
                learning_rate=1e-3,
                reference=model,
            )
    return complete(config)
