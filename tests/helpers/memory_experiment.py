"""A small experiment of three clients from memory, for ``mira.run`` on objects."""

from __future__ import annotations

from typing import Any

DATA = {
    name: [{"instruction": "Add.", "input": f"{n} and {k}", "output": str(n + k)} for n in range(8)]
    for k, name in enumerate(("ann", "bob", "cleo"))
}
PLAN: dict[str, Any] = {
    "rounds": 3,
    "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
    "split": {"train": 4, "validation": 2, "test": 2},
    "prompt": {"template": "alpaca"},
    "training": {"lr": 0.02, "local_steps": 2, "batch_size": 2},
    "graph": {"name": "complete"},
    "engine": {"threads": 1},
    "evaluation": {"max_new_tokens": 3, "transfer_clients": 0},
}
