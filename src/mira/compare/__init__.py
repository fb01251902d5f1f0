"""Methods × grid × seeds over one experiment: tuned on validation data, tested once, told apart by paired tests."""

from mira.compare.plan import Comparison, Plan, load
from mira.compare.run import compare

__all__ = ["Comparison", "Plan", "compare", "load"]
