"""Distillation: losses on a teacher's outputs, and the teachers themselves."""

from kdq.distill import losses

__all__ = ["losses"]
