"""Networks that were trained elsewhere: their files read, and converted to Flax."""

from kdq.models.pretrained.convert import ConversionError, Rule, convert
from kdq.models.pretrained.tensors import TensorFileError, read_tensors

__all__ = ["ConversionError", "Rule", "TensorFileError", "convert", "read_tensors"]
