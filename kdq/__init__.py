"""kdq: knowledge distillation and quantization as arms of one controlled experiment."""

__version__ = "0.1.0"
