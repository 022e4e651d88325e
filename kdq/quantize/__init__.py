"""Quantization of any Linen model, by rules on layer paths, without editing the model.

rules = (QuantizationRule(path=".*", weights=TensorSpec(bits=4, granularity="per_channel"),
                          activations=TensorSpec(bits=8)),)
qparams = calibrate(model, variables, rules, batches)
logits = apply(model, variables, qparams, inputs)
"""

from kdq.quantize.calibrate import calibrate
from kdq.quantize.formats import FORMATS
from kdq.quantize.grid import Dynamic, Quantizer, Training
from kdq.quantize.inputs import Inputs, masked
from kdq.quantize.layers import LayerInfo, list_layers, list_unquantized
from kdq.quantize.network import Network, Weights, apply, as_network, predict
from kdq.quantize.observers import (
    MSE,
    AbsMax,
    Entropy,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
)
from kdq.quantize.qat import finish, plain, prepare, widened, with_keys
from kdq.quantize.rules import QuantizationRule, TensorSpec, uniform_rules
from kdq.quantize.scales import Scales, replace_scales, scales
from kdq.quantize.sqnr import Sqnr, sqnr
from kdq.quantize.ste import fake_quantize
from kdq.quantize.summary import Summary, summary

__all__ = [
    "FORMATS",
    "MSE",
    "AbsMax",
    "Dynamic",
    "Entropy",
    "Inputs",
    "LayerInfo",
    "MinMax",
    "MovingAverage",
    "Network",
    "Observer",
    "Percentile",
    "QuantizationRule",
    "Quantizer",
    "Scales",
    "Sqnr",
    "Summary",
    "TensorSpec",
    "Training",
    "Weights",
    "apply",
    "as_network",
    "calibrate",
    "fake_quantize",
    "finish",
    "list_layers",
    "list_unquantized",
    "masked",
    "plain",
    "predict",
    "prepare",
    "replace_scales",
    "scales",
    "sqnr",
    "summary",
    "uniform_rules",
    "widened",
    "with_keys",
]
