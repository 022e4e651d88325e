"""Metrics of trained and of deployed models, and what a few seeds allow to claim."""
