"""Comparisons: methods × grid × seeds over one experiment, tuned on validation data, tested once, with paired tests."""

from mira.comparison.plan import Comparison, Plan, load
from mira.comparison.run import compare

__all__ = ["Comparison", "Plan", "compare", "load"]
