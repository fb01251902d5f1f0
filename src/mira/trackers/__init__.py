"""Where a run can be watched from outside: TensorBoard always, Weights & Biases and MLflow where asked for.

A tracker is given numbers and hyper-parameters, never a text or an example, and clients by number where they leave this
machine. It runs beside the rounds: a slow one does not hold them, and a failed one is off after one warning.
"""

from mira.trackers.follow import Trackers, Tracking

__all__ = ["Trackers", "Tracking"]
