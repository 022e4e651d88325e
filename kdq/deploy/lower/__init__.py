"""From a quantized network to integers."""
