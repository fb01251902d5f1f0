"""What rounding rows on their way costs in loss: the demo's twelve tasks on its real model, one site each, in fp32, bf16, int8.

``python -m benchmarks.wire`` prints the table and writes benchmarks/out/wire.json, from which it goes on. The sites are those of
``mira client``, each with a base model of its own, over the transport in one process: a few minutes a run on one thread. Short
prompts (``prompt.template=plain``) and batches of two make it so; ``--set`` changes any field.

Runs whose rows are exact differ too once a sum is made in another order, and more so the smaller their losses. How much is
measured beside it: exact rows again, and every prompt computed as a whole.
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

from mira import Experiment
from mira.core.wire import Wire
from mira.data.federation import make_federation
from mira.data.sources.sites import Sites
from mira.fleet.messages.transport import InProcessTransport
from mira.fleet.server.session import Opener
from mira.fleet.site.handler import SiteHandler
from mira.results.statistics import mean
from mira.runner import run as experiment

OUT = Path(__file__).parent / "out" / "wire.json"
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
QUICK = (
    "prompt.template=plain", "training.batch_size=2", "engine.threads=1",
    "evaluation.generate=false", "evaluation.transfer_clients=0", "evaluation.every=4",
)  # fmt: skip


OTHERWISE = "fp32, sums in another order"
VARIANTS = {
    **{wire: [f"server.wire={wire}"] for wire in get_args(Wire)},
    OTHERWISE: ["server.wire=fp32", "engine.prefix=off"],
}


def measure(wanted: Experiment, folder: Path) -> dict[str, Any]:
    """The losses after the last round of ``wanted`` with a site for each of its clients, and the bytes of rows."""
    clients = make_federation(wanted.data, wanted.split, wanted.seed).clients
    sites = {client.name: SiteHandler(client.name, wanted.data, folder / "sites" / client.slug) for client in clients}
    transport = InProcessTransport({name: site.handle for name, site in sites.items()})
    apart = wanted.model_copy(update={"data": Sites(groups={client.name: client.group for client in clients})})
    result = experiment.run(apart, folder / "run", open=Opener(transport, sites.keys, patience=0.0))
    return {key: result[key] for key in ("local_loss", "validation_loss", "bytes_up", "bytes_down", "lost", "seconds")}


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """One line a run, with the test loss relative to that of fp32 with the same seed."""
    exact = {run["seed"]: run["local_loss"] for run in runs if run["wire"] == "fp32"}
    grid = Table("wire", "seed", "test loss", "to fp32", "validation loss", "MB up", "MB down", "seconds")
    for run in sorted(runs, key=lambda run: (list(VARIANTS).index(run["wire"]), run["seed"])):
        base = exact.get(run["seed"])
        grid.add_row(
            run["wire"], str(run["seed"]), f"{run['local_loss']:.4f}",
            "" if base is None else f"{run['local_loss'] / base - 1:+.2%}", f"{run['validation_loss']:.4f}",
            *(f"{run[key] / 1e6:.1f}" for key in ("bytes_up", "bytes_down")), f"{run['seconds']:.0f}",
        )  # fmt: skip
    return grid


def means(runs: Sequence[dict[str, Any]]) -> Table:
    """Over seeds: the mean test loss of each, and its difference to fp32 with the same seed, ± half the 95 % interval."""
    exact = {run["seed"]: run["local_loss"] for run in runs if run["wire"] == "fp32"}
    grid = Table("wire", "seeds", "mean test loss", "mean difference to fp32")
    for wire in VARIANTS:
        losses = {run["seed"]: run["local_loss"] for run in runs if run["wire"] == wire and run["seed"] in exact}
        if len(losses) > 1:
            lost = mean([loss - exact[seed] for seed, loss in losses.items()])
            told = "" if wire == "fp32" or lost is None else f"{lost.value:+.4f} ± {lost.half:.4f}"
            grid.add_row(wire, str(len(losses)), f"{sum(losses.values()) / len(losses):.4f}", told)
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--wires", nargs="+", choices=list(VARIANTS), default=["fp32", "int8", OTHERWISE])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else []
    done = {(run["wire"], run["seed"], tuple(run["set"])) for run in runs}
    for seed in given.seeds:
        for wire in given.wires:
            if (wire, seed, tuple(given.overrides)) in done:
                continue
            asked = Experiment.from_yaml(DEMO, [*QUICK, f"seed={seed}", *VARIANTS[wire], *given.overrides])
            with tempfile.TemporaryDirectory() as folder:
                runs.append({"wire": wire, "seed": seed, "set": given.overrides, **measure(asked, Path(folder))})
            print(json.dumps(runs[-1]), flush=True)
            OUT.parent.mkdir(exist_ok=True)
            OUT.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    same = [run for run in runs if run["set"] == given.overrides]
    Console().print(table(same), means(same))


if __name__ == "__main__":
    main()
