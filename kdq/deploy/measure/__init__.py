"""Measurements of an exported network: its costs, and its agreement with the simulation."""
