"""The offset of the base over machines: each row travels to each site once, and a site computes with nothing else."""

from __future__ import annotations

from typing import Any

import torch

from helpers.in_process_federation import NAMES, Troubled, World, metrics
from mira.core.offset import OFFSET as COMMITTED
from mira.fleet.messages.packet import OFFSET, Packet, pack, unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply, Reply
from mira.runner import run as experiment
from mira.store import Store

FLORA: dict[str, Any] = {
    "method": {"name": "flora"}, "rounds": 2, "training": {"local_steps": 1},
    "evaluation": {"generate": False, "transfer_clients": 0},
}  # fmt: skip


def packets(transport: Troubled, name: str) -> list[Packet]:
    return [message for site, data in transport.sent if site == name and OFFSET in (message := unpack(data)).values]


def test_each_row_travels_once_and_a_new_process_of_the_site_has_it(world: World) -> None:
    sites = world.sites()
    _, transport = world.apart(sites, **FLORA, server={"wire": "int8"})
    with Store.open(world.folder / "apart", writable=False) as store:
        offset = store.extra()[COMMITTED]
    for name in NAMES:
        sent = [p.tensors[OFFSET] for p in packets(transport, name) if OFFSET in p.tensors]
        assert [len(rows) for rows in sent] == [3, 3]  # of a round's three clients
        assert torch.equal(torch.cat(sent), offset)  # exact, while adapters travel rounded
    added = [record["offset_bytes"] for record in metrics(world.folder / "apart")[1:]]
    assert added == [3 * offset[0].nbytes] * 2
    last = [p for p in packets(transport, "ann") if p.head.kind == "evaluate"][-1]
    assert last.values[OFFSET]["first"] != 0
    known = Packet(last.head, last.values | {OFFSET: {**last.values[OFFSET], "first": len(offset)}}, {
        name: rows for name, rows in last.tensors.items() if name != OFFSET
    })  # fmt: skip
    before = unpack(sites["ann"].handle(pack(known))).tensors["nll"]
    again = world.sites()["ann"]
    assert torch.equal(unpack(again.handle(pack(known))).tensors["nll"], before)
    [kept] = (world.folder / "sites" / "ann").rglob(f"{OFFSET}.safetensors")
    kept.unlink()
    assert "has not all of the offset" in unpack(world.sites()["ann"].handle(pack(known))).values["failed"]


def test_a_site_that_did_not_answer_gets_all_of_it_again(world: World) -> None:
    """Its reply to the second training is lost, though it has done it; the losses are those of a run where it was away."""

    def change(name: str, request: bytes, reply: bytes) -> Reply:
        head = unpack(request).head
        return NoReply("late") if (name, head.kind, head.round) == ("bob", "train", 1) else reply

    transport = Troubled(InProcessTransport({n: site.handle for n, site in world.sites().items()}), change=change)
    experiment.run(world.experiment(**FLORA), world.folder / "apart", (), world.opener(transport))
    record = metrics(world.folder / "apart")[-1]
    assert "bob" in record["lost"]
    assert not record.get("unmeasured")
    firsts = [p.values[OFFSET]["first"] for p in packets(transport, "bob")]
    assert firsts.count(0) > 1
    assert len(packets(transport, "bob")[-1].tensors.get(OFFSET, [])) in (0, 5)
    with Store.open(world.folder / "apart", writable=False) as store:
        assert len(store.extra()[COMMITTED]) == 5


WRONG: dict[str, Any] = {
    "no mapping": 3, "first of text": {"first": "0", "sha256": ""}, "first below 0": {"first": -1, "sha256": ""},
    "other sum": {"first": 0, "sha256": "0" * 64},
}  # fmt: skip


def test_a_site_refuses_what_is_no_offset_and_goes_on(world: World) -> None:
    sites = world.sites()
    _, transport = world.apart(sites, **FLORA | {"rounds": 1})
    good = next(p for p in packets(transport, "ann") if p.head.kind == "evaluate" and OFFSET in p.tensors)
    rows = good.tensors[OFFSET]
    bad = [Packet(good.head, good.values | {OFFSET: wrong}, good.tensors) for wrong in WRONG.values()]
    tensors = [rows[:, :-1], rows[0], rows.half(), rows / 0]
    bad += [Packet(good.head, good.values, good.tensors | {OFFSET: wrong}) for wrong in tensors]
    for packet in bad:
        assert "offset of the base" in unpack(sites["ann"].handle(pack(packet))).values["failed"]
    assert unpack(sites["ann"].handle(pack(good))).tensors["nll"].isfinite().all()
