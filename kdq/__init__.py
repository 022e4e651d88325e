"""kdq: knowledge distillation and quantization as arms of one controlled experiment."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`kdq.compress`, without what it needs being imported by everything else."""
    if name == "compress":
        from kdq.own import compress  # noqa: PLC0415

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
