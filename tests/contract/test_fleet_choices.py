"""Rows that sites choose from: what travels, what a site may answer, and what a server may offer."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.in_process_federation import NAMES, Troubled, World, metrics
from mira.config import load
from mira.core.wire import Wire
from mira.fleet.messages.packet import Packet, pack, unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply, Reply
from mira.runner import run as experiment

PERSONAL: dict[str, Any] = {
    "method": {"name": "mira", "strength": "personal"}, "training": {"local_steps": 1},
    "evaluation": {"generate": False, "transfer_clients": 0},
}  # fmt: skip


def payload(data: bytes) -> int:
    return sum(tensor.nbytes for key, tensor in unpack(data).tensors.items() if key.startswith("row"))


@pytest.mark.parametrize(
    ("wire", "method", "rows"),
    [("fp32", {"name": "mira", "strength": "personal"}, 2), ("int8", {"name": "ifca", "clusters": 3}, 3)],
)
def test_the_metrics_count_the_rows_offered(world: World, wire: Wire, method: dict[str, Any], rows: int) -> None:
    """The two ends of a line, whatever the number of points; the row of each cluster."""
    _, transport = world.apart(world.sites(), rounds=2, **PERSONAL | {"method": method, "server": {"wire": wire}})
    last = metrics(world.folder / "apart")[-1]
    for name in NAMES:
        sent = [data for site, data in transport.sent if site == name]
        heads = [unpack(data).head for data in sent]
        # The choice before the second training still bears the number of the first.
        train = [payload(d) for d, h in zip(sent, heads, strict=True) if (h.kind, h.round) == ("train", 1)]
        offered = [payload(d) for d, h in zip(sent, heads, strict=True) if h.kind == "choose"]
        assert last["client_bytes"][name]["down"] == train[-1] + offered[-1]
        assert offered[-1] == rows * train[-1]


@pytest.mark.parametrize("kind", ["silent", "no data", "negative", "not finite", "other shape", "broken"])
def test_a_site_without_a_good_answer_goes_half_of_the_way_and_is_named_once(
    world: World, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def change(name: str, request: bytes, reply: bytes) -> Reply:
        message = unpack(reply)
        if name != "ann" or message.head.kind != "choose":
            return reply
        nll = message.tensors["nll"]
        wrong = {"negative": -nll, "not finite": nll / 0, "other shape": nll[:, :2]}.get(kind, nll)
        none = {"nll": nll * 0, "tokens": message.tensors["tokens"] * 0}
        made = pack(replace(message, tensors=message.tensors | (none if kind == "no data" else {"nll": wrong})))
        return {"silent": NoReply("late"), "broken": made[:-3]}.get(kind, made)

    transport = Troubled(InProcessTransport({name: site.handle for name, site in world.sites().items()}), change=change)
    plan = PERSONAL | {"method": {"name": "mira"}}  # personal is the default
    with caplog.at_level(logging.WARNING, "mira"):
        experiment.run(world.experiment(rounds=2, **plan), world.folder / "apart", (), world.opener(transport))
    for record in metrics(world.folder / "apart")[1:]:
        assert not record["lost"]
        assert sorted(record["strength"]) == list(NAMES)
        assert record["strength"]["ann"] == 0.5
        assert record["offers"]["strength"]["losses"]["ann"] == [None] * 5
        assert min(record["offers"]["strength"]["losses"]["bob"]) > 0
    told = [line for line in caplog.messages if "to choose by" in line]
    assert told == ["ann tells no loss to choose by, first in round 1, and takes strength 0.5"]
    assert load(world.folder / "apart" / "config.yaml").method.strength == "personal"  # type: ignore[attr-defined]


@pytest.mark.quick
@pytest.mark.parametrize("split", ["validation", "train"])
def test_a_site_whose_uploads_have_noise_chooses_nothing(world: World, split: str) -> None:
    """Whatever method the server has: sites are not told it."""
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    sites = world.sites(min_noise=2.0)
    private = PERSONAL | {"method": {"name": "mira"}, "privacy": {"clip": 0.5, "noise": 2.0}}
    _, transport = world.apart(sites, rounds=1, **private)
    name, trained = next(
        (name, packet) for name, data in transport.sent if (packet := unpack(data)).head.kind == "train"
    )
    row = trained.tensors["row0"]
    offer = {"points": [0.0, 1.0], "split": split, "limit": None, "since": 0, "private_parts": False}
    asked = Packet(replace(trained.head, kind="choose"), offer, {"row0": row, "row1": row})
    said = unpack(sites[name].handle(pack(asked)))
    assert said.values == {"failed": "a choice by losses on its data has no noise (privacy.unit=site)"}
    assert not said.tensors
    measure = {"rows": 1, "splits": ["test", split], "limit": None, "since": 0, "private_parts": False}
    asked = Packet(replace(trained.head, kind="evaluate"), measure, {"row0": row})
    refused = {"failed": "the loss on its training examples has no noise (privacy.unit=site)"}
    told = unpack(sites[name].handle(pack(asked)))
    assert (told.values == refused) == (split == "train")
    assert bool(told.tensors) == (split == "validation")


WRONG: dict[str, Any] = {
    "no split": {"split": "test"}, "points beyond": {"points": [0.0, 2.0]}, "points of text": {"points": ["0"]},
    "no points": {"points": []},
}  # fmt: skip


@pytest.mark.parametrize("wrong", [*WRONG, "one row", "not finite", "short"])
def test_a_site_refuses_an_offer_that_is_none_and_goes_on(world: World, wrong: str) -> None:
    sites = world.sites()
    _, transport = world.apart(sites, rounds=1, **PERSONAL)
    good = next(unpack(data) for name, data in transport.sent if name == "ann" and unpack(data).head.kind == "choose")
    tensors = {
        "one row": {"row0": good.tensors["row0"]},
        "not finite": {key: torch.full_like(row, 255) for key, row in good.tensors.items()},
        "short": {key: row[:-4] for key, row in good.tensors.items()},
    }.get(wrong, good.tensors)
    bad = Packet(good.head, good.values | WRONG.get(wrong, {}), tensors)
    assert unpack(sites["ann"].handle(pack(bad))).values["failed"].startswith("not an offer: ")
    assert unpack(sites["ann"].handle(pack(good))).tensors["nll"].shape == (1, 5)
