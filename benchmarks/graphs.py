"""How well a run's graph recovers the families its clients are of: ``python -m benchmarks.graphs RUN…``.

Each RUN is the folder of a run whose graph saw no family (``learned``, ``knn``, ``similarity``). Prints, and adds to
benchmarks/out/graphs.json, the area under the ROC curve of its edge weights against "same family", over all pairs of
clients, beside that of the same weights against families dealt out at random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mira.core.errors import UserError
from mira.core.graph import Graph
from mira.core.seeds import generator
from mira.results.html.load import RunData, read

OUT = Path(__file__).parent / "out" / "graphs.json"
_SHUFFLES = 200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graphs", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    try:
        found = [_figures(read(folder)) for folder in parser.parse_args().runs]
    except UserError as error:
        parser.error(str(error))
    kept = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else []
    new = [{key: one[key] for key in ("config", "seed")} for one in found]
    kept = [one for one in kept if {key: one[key] for key in ("config", "seed")} not in new]
    OUT.write_text(json.dumps(kept + found, indent=1) + "\n", encoding="utf-8")
    for one in found:
        print(
            f"{one['graph']}, seed {one['seed']}, {one['rounds']} rounds: AUC {one['auc']:.3f}, shuffled"
            f" {one['shuffled']:.3f}, family edges {one['family_edges']} of {one['family_pairs']}, others {one['other_edges']}"
        )


def auc(weight: Tensor, related: Tensor) -> float:
    """Area under the ROC curve: how often a related pair has the larger weight, equal ones counted half. weight [n], related
    [n] bool. Raises UserError where all pairs are alike."""
    yes, no = weight[related], weight[~related]
    if not len(yes) or not len(no):
        raise UserError("AUC: related and unrelated pairs are needed; are the clients of more than one family?")
    difference = yes[:, None] - no
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def _figures(run: RunData) -> dict[str, Any]:
    weight, pairs = _weights(run.graph, len(run.names))
    family = torch.tensor([sorted(set(run.groups)).index(group) for group in run.groups])
    related = family[pairs[0]] == family[pairs[1]]
    draw = generator("shuffled families", 0)
    shuffled = []
    for _ in range(_SHUFFLES):
        other = family[torch.randperm(len(family), generator=draw)]
        shuffled.append(auc(weight, other[pairs[0]] == other[pairs[1]]))
    settings = {key: value.strip('"') for key, value in run.config.items() if key.split(".")[0] in _TOLD}
    return {
        "graph": settings["graph.name"], "seed": run.seed, "rounds": len(run.records) - 1,
        "auc": auc(weight, related), "shuffled": fmean(shuffled),
        "family_edges": int((weight[related] > 0).sum()), "family_pairs": int(related.sum()),
        "other_edges": int((weight[~related] > 0).sum()),
        "config": settings, "model": run.environment["model"]["sha256"], "commit": run.environment.get("commit"),
        "machine": run.environment.get("machine"),
    }  # fmt: skip


_TOLD = ("rounds", "cohort", "model", "adapter", "data", "split", "training", "method", "graph", "prompt")


def _weights(graph: Graph, clients: int) -> tuple[Tensor, Tensor]:
    """The weight of every pair of clients [n], 0 without an edge, and the pairs [2,n]."""
    everyone = torch.arange(clients)
    dense, pairs = graph.weights(everyone, everyone), torch.triu_indices(clients, clients, 1)
    return dense[pairs[0], pairs[1]], pairs


if __name__ == "__main__":
    main()
