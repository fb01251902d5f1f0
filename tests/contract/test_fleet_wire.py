"""What rows take on their way: counted as they pass, and rounded without harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.in_process_federation import NAMES, World, lost_and_away, metrics, rows
from mira.core.wire import Wire
from mira.fleet.messages.packet import Packet, unpack

HEAD = 2048  # bytes of a message beside its rows, at most: names, losses, masks


def trained(passed: list[tuple[str, bytes]], round: int) -> dict[str, tuple[Packet, int]]:
    """The messages of the training of ``round`` and their bytes, by site."""
    messages = [(name, unpack(data), len(data)) for name, data in passed]
    return {
        name: (message, size)
        for name, message, size in messages
        if (message.head.kind, message.head.round) == ("train", round)
    }


def payload(message: Packet) -> int:
    """Bytes of the rows in it."""
    return sum(tensor.nbytes for key, tensor in message.tensors.items() if key.startswith("row"))


COUNTED: list[tuple[Wire, str, dict[str, int]]] = [
    ("fp32", "mira", {}), ("fp32", "fedsa-lora", {}), ("bf16", "fedit", {}), ("bf16", "ffa-lora", {}), ("int8", "mira", {}),
    ("int8", "mr-mtl", {}), ("int8", "ditto", {}), ("int8", "local", {}), ("int8", "fedsvd", {}),
    ("int8", "fedit", {"ann": 5, "cleo": 23}),
]  # fmt: skip


@pytest.mark.parametrize(("wire", "name", "rank"), COUNTED)
def test_the_metrics_count_the_bytes_that_pass(world: World, wire: Wire, name: str, rank: dict[str, int]) -> None:
    """Of each site and round: what its rows take in the messages, and nearly all of what the messages take; by hand where the
    whole row goes once each way. A mask of a byte a number would be longer than all else that is not counted."""
    plan: dict[str, Any] = {
        "evaluation": {"generate": False, "transfer_clients": 0}, "server": {"wire": wire}, "clients": {"rank": rank},
        "adapter": {"rank": 32}, "training": {"local_steps": 1},
    }  # fmt: skip
    half = {"strength": 0.5} if name == "mira" else {}  # nothing offered: test_fleet_choices counts that
    _, transport = world.apart(world.sites(), rounds=2, method={"name": name, **half}, **plan)
    size = len(load_file(world.folder / "apart" / "start.safetensors")["start"])
    assert size > 2 * HEAD
    for record in metrics(world.folder / "apart")[1:]:
        assert not record["lost"]
        ways = {"down": transport.sent, "up": transport.received}
        for way, passed in ways.items():
            for site, (message, whole) in trained(passed, record["round"] - 1).items():
                counted = record["client_bytes"][site][way]
                assert counted == payload(message)
                assert counted < whole <= counted + HEAD
        if name in ("fedit", "mira") and not rank:
            each = {"fp32": (4 * size, 4 * size), "bf16": (2 * size, 2 * size)}
            by_hand = each.get(wire, (2 * size, size + 4 * -(-size // 256)))
            assert record["client_bytes"] == {site: dict(zip(("down", "up"), by_hand, strict=True)) for site in NAMES}


@pytest.mark.parametrize(("name", "wire"), [("mira", "bf16"), ("flora", "fp32")])
def test_a_server_that_is_told_no_format_takes_one_that_its_method_allows(world: World, name: str, wire: Wire) -> None:
    """The run folder keeps it, and the sites are told."""
    plan: dict[str, Any] = {"evaluation": {"generate": False, "transfer_clients": 0}, "training": {"local_steps": 1}}
    _, transport = world.apart(world.sites(), rounds=1, method={"name": name}, server={"wire": None}, **plan)
    opened = [unpack(data) for _, data in transport.sent]
    told = {m.values["experiment"]["server"]["wire"] for m in opened if m.head.kind == "open"}
    assert told == {wire}
    kept = yaml.safe_load((world.folder / "apart" / "config.yaml").read_text())
    assert kept["server"]["wire"] == wire


@pytest.mark.parametrize(
    ("wire", "name"),
    [("bf16", "mira"), ("int8", "mira"), ("int8", "fedsa-lora"), ("int8", "rolora"), ("bf16", "feddpa")],
)
def test_rounded_rows_train_as_exact_ones_do(world: World, wire: Wire, name: str) -> None:
    """Three rounds of a tiny model: the loss moves by far more than the rounding changes it."""
    plan: dict[str, Any] = {"method": {"name": name}, "evaluation": {"generate": False, "transfer_clients": 0}}
    world.apart(world.sites("exact"), "exact-run", **plan)
    world.apart(world.sites("rounded"), "rounded-run", server={"wire": wire}, **plan)
    exact, rounded = metrics(world.folder / "exact-run"), metrics(world.folder / "rounded-run")
    progress = abs(exact[-1]["local_loss"] - exact[0]["local_loss"])
    assert progress > 1e-3
    assert 0 < abs(rounded[-1]["local_loss"] - exact[-1]["local_loss"]) < 0.02 * progress


def test_what_rounding_took_away_is_kept_with_the_round_that_counted(world: World) -> None:
    """A reply that is lost takes its residual with it: the rows are those of a run in which the round never was."""
    plan: dict[str, Any] = {"method": {"name": "fedit"}, "server": {"wire": "int8"}}
    lost_and_away(world, plan)
    a, b = rows(world.folder / "a-run"), rows(world.folder / "b-run")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all("residuals0" in load_file(file) for file in (world.folder / "sites").rglob("r3.safetensors"))
