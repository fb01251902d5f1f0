"""Speed and memory of the batched engine against plain PEFT loops. ``python -m benchmarks`` runs them all."""

import os

# As the command sets it: threads that wait do not burn the core that another one computes on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
