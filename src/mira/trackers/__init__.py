"""Experiment trackers: TensorBoard always, Weights & Biases and MLflow on request.

A tracker receives numbers and hyper-parameters, never an example or an instruction to the model. Where data leaves this machine,
clients have numbers instead of names. Trackers run beside the rounds: a slow one does not delay them, and a failed one is off
after one warning.
"""

from mira.trackers.follow import Trackers, Tracking

__all__ = ["Trackers", "Tracking"]
