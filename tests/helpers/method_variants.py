"""Every registered method as the contract tests run it, some with settings that show more of it than the defaults."""

from __future__ import annotations

from typing import Any

from mira.core.graph import Graph
from mira.core.learned_graph import Learned
from mira.core.types import Method
from mira.methods import METHODS

VARIANTS: dict[str, Any] = {name: METHODS[name]() for name in METHODS} | {
    "mira": METHODS["mira"](strength=0.4),
    "mira-all": METHODS["mira"](strength=0.4, neighbours="all"),
    "mira-paper": METHODS["mira"](form="paper", regularisation=2.0),
    "mira-paper-all": METHODS["mira"](form="paper", regularisation=2.0, neighbours="all"),
    "mira-learned": METHODS["mira"](strength=0.4),
    "mira-personal": METHODS["mira"](strength="personal"),
    "mira-similarity": METHODS["mira"](strength="similarity"),
    "mira-common": METHODS["mira"](strength=0.4, common_rounds=1),
    "fedprox": METHODS["fedprox"](mu=0.3),
    "ditto": METHODS["ditto"](lam=0.3),
    "mr-mtl": METHODS["mr-mtl"](lam=0.3),
    "pfedme": METHODS["pfedme"](lam=0.3, step=0.5),
    "pfedgraph": METHODS["pfedgraph"](lam=0.3),
    "fedamp": METHODS["fedamp"](lam=0.3),
    "fedavgm": METHODS["fedavgm"](lr=0.7),
    "fedadam": METHODS["fedadam"](lr=0.01),
}
ROW_OF_EACH = [  # row k is client k's
    name for name in VARIANTS if name == "local" or (name.startswith("mira") and name != "mira-common")
]
COHORT_MIXED = ["pfedgraph", "cfl", "fedtreelora"]  # row k is client k's, made of the rows of the cohort
BESIDE_ONE = [
    "ditto",
    "mr-mtl",
    "pfedme",
    "fedsa-lora",
    "fedavg-ft",
    "mira-common",
    "scaffold",
]  # row 0 is that of all, row k + 1 client k's
TWO_OF_EACH = ["fedamp"]  # row k is client k's, row K + k the one it is pulled to
HALVES = ["fedalt", "feddpa"]  # a row holds two adapters: an even rank
ONE_ROW = [name for name in VARIANTS if name not in ROW_OF_EACH + COHORT_MIXED + BESIDE_ONE + TWO_OF_EACH + HALVES]
ONE_RANK = ["fedsvd", "fedex-lora", "scaffold", "fedtreelora", "ifca", *HALVES]  # refuse clients of unlike ranks
WHOLE = {name: method for name, method in VARIANTS.items() if name not in HALVES}


def used_by(method: Method, known: Graph) -> Graph:
    """``known``, or of as many clients a graph that is still to be learned, where ``method`` is the variant that learns it."""
    return Learned.start(known.num_clients, 1, 3, 0.0) if method is VARIANTS["mira-learned"] else known
