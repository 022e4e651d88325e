"""Files: packed, ONNX, LiteRT, StableHLO."""
