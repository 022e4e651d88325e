"""Codes that flow between layers without a float in between."""
