"""What rounding rows on their way costs in loss: the demo's twelve tasks on its real model, one site each, in fp32, bf16, int8.

``python -m benchmarks.wire`` prints the table and writes benchmarks/out/wire.json. The sites are those of ``mira client``, each
with a base model of its own, over the transport in one process: about 4 GB, and a few minutes a run on one thread. Short
prompts (``prompt.template=plain``) and batches of two make it so; ``--set`` changes any field.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from mira import Experiment, experiment
from mira.core.wire import Wire
from mira.data.federation import make_federation
from mira.data.sources.sites import Sites
from mira.fleet.seam import InProcess
from mira.fleet.server import Opener
from mira.fleet.site import Site

OUT = Path(__file__).parent / "out" / "wire.json"
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
QUICK = (
    "model.dtype=bfloat16", "prompt.template=plain", "training.batch_size=2", "engine.threads=1",
    "evaluation.generate=false", "evaluation.transfer_clients=0", "evaluation.every=4",
)  # fmt: skip


def measure(wanted: Experiment, folder: Path) -> dict[str, Any]:
    """The losses after the last round of ``wanted`` with a site for each of its clients, and the bytes of rows."""
    clients = make_federation(wanted.data, wanted.split, wanted.seed).clients
    sites = {client.name: Site(client.name, wanted.data, folder / "sites" / client.slug) for client in clients}
    transport = InProcess({name: site.handle for name, site in sites.items()})
    apart = wanted.model_copy(update={"data": Sites(groups={client.name: client.group for client in clients})})
    result = experiment.run(apart, folder / "run", open=Opener(transport, sites.keys, patience=0.0))
    return {
        "wire": wanted.server.wire, "seed": wanted.seed,
        **{key: result[key] for key in ("local_loss", "validation_loss", "bytes_up", "bytes_down", "lost", "seconds")},
    }  # fmt: skip


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """One line a run, with the test loss relative to that of fp32 with the same seed."""
    exact = {run["seed"]: run["local_loss"] for run in runs if run["wire"] == "fp32"}
    grid = Table("wire", "seed", "test loss", "to fp32", "validation loss", "MB up", "MB down", "seconds")
    for run in runs:
        base = exact.get(run["seed"])
        grid.add_row(
            run["wire"], str(run["seed"]), f"{run['local_loss']:.4f}",
            "" if base is None else f"{run['local_loss'] / base - 1:+.2%}", f"{run['validation_loss']:.4f}",
            *(f"{run[key] / 1e6:.1f}" for key in ("bytes_up", "bytes_down")), f"{run['seconds']:.0f}",
        )  # fmt: skip
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--wires", nargs="+", choices=get_args(Wire), default=list(get_args(Wire)))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        for wire in given.wires:
            asked = Experiment.from_yaml(DEMO, [*QUICK, *given.overrides, f"seed={seed}", f"server.wire={wire}"])
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure(asked, Path(folder)))
            print(json.dumps(runs[-1]), flush=True)
            OUT.parent.mkdir(exist_ok=True)
            OUT.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    Console().print(table(runs))


if __name__ == "__main__":
    main()
