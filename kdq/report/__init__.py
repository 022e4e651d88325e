"""Records of runs become tables and plots; nothing here computes a metric or trains a model.

A record (`kdq.record.ArmRecord`) is what one arm and seed is and what was measured of it. Functions
of this package take records as objects, or as the JSON objects of `result.json` and `results.json`.
"""
