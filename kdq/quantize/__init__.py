"""Quantization of any Linen model, by rules on layer paths, without editing the model.

rules = (QuantizationRule(path=".*", weights=TensorSpec(bits=4, granularity="per_channel"),
                          activations=TensorSpec(bits=8)),)
qparams = calibrate(model, variables, rules, batches)
logits = apply(model, variables, qparams, inputs)
"""

from kdq.quantize.calibrate import calibrate
from kdq.quantize.layers import LayerInfo, list_layers
from kdq.quantize.observers import MSE, AbsMax, MinMax, MovingAverage, Observer, Percentile
from kdq.quantize.rules import QuantizationRule, TensorSpec, uniform_rules
from kdq.quantize.scales import replace_scales, scales
from kdq.quantize.simulate import apply, predict
from kdq.quantize.ste import fake_quantize

__all__ = [
    "MSE",
    "AbsMax",
    "LayerInfo",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "QuantizationRule",
    "TensorSpec",
    "apply",
    "calibrate",
    "fake_quantize",
    "list_layers",
    "predict",
    "replace_scales",
    "scales",
    "uniform_rules",
]
