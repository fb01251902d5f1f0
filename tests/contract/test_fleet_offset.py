"""The offset of the base over machines: each row travels to each site once, and a site computes with nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.in_process_federation import NAMES, Troubled, World, metrics
from helpers.sample_config import Interrupt
from mira.core.offset import OFFSET as COMMITTED
from mira.fleet.messages.packet import OFFSET, Packet, fingerprint, pack, unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply, Reply
from mira.runner import evaluation
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
    _, transport = world.apart(sites, **FLORA | {"method": {"name": "fedex-lora"}}, server={"wire": "int8"})
    with Store.open(world.folder / "apart", writable=False) as store:
        offset = store.extra()[COMMITTED]
    for name in NAMES:
        sent = [p.tensors[OFFSET] for p in packets(transport, name) if OFFSET in p.tensors]
        assert [len(rows) for rows in sent] == [4, 4]  # of a round's three clients and their mean
        assert torch.equal(torch.cat(sent), offset)  # exact, while adapters travel rounded
    added = [record["offset_bytes"] for record in metrics(world.folder / "apart")[1:]]
    assert added == [4 * offset[0].nbytes] * 2
    last = [p for p in packets(transport, "ann") if p.head.kind == "evaluate"][-1]
    assert last.values[OFFSET]["first"] != 0
    known = Packet(last.head, last.values | {OFFSET: {**last.values[OFFSET], "first": len(offset)}}, {
        name: rows for name, rows in last.tensors.items() if name != OFFSET
    })  # fmt: skip
    before = unpack(sites["ann"].handle(pack(known))).tensors["nll"]
    again = world.sites()["ann"]
    assert torch.equal(unpack(again.handle(pack(known))).tensors["nll"], before)
    early = next(p for p in packets(transport, "ann") if p.head.kind == "evaluate" and OFFSET in p.tensors)
    again.handle(pack(early))  # a late one does not take the later rows away
    assert torch.equal(unpack(again.handle(pack(known))).tensors["nll"], before)
    [kept] = (world.folder / "sites" / "ann").rglob(f"{OFFSET}.safetensors")
    kept.unlink()
    assert "lacks rows of the offset" in unpack(world.sites()["ann"].handle(pack(known))).values["failed"]


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
    [kept] = (world.folder / "sites" / "ann").rglob(f"{OFFSET}.safetensors")
    kept.write_bytes(b"damaged")
    nll = unpack(sites["ann"].handle(pack(good))).tensors["nll"]
    assert nll.isfinite().all()
    none = Packet(good.head, {key: value for key, value in good.values.items() if key != OFFSET}, {
        name: rows for name, rows in good.tensors.items() if name != OFFSET
    })  # fmt: skip
    bare = unpack(sites["ann"].handle(pack(none))).tensors["nll"]
    assert torch.equal(bare, unpack(world.sites()["ann"].handle(pack(none))).tensors["nll"])  # the base as loaded
    assert not torch.equal(bare, nll)


def exported_on(transport: Troubled, name: str) -> Any:
    [last] = [p for p in packets(transport, name) if p.head.kind == "finish"]
    return last.values[OFFSET]["sha256"]


def committed(world: World) -> str:
    with Store.open(world.folder / "apart", writable=False) as store:
        return fingerprint(store.extra()[COMMITTED])


def test_sites_export_on_the_offset_of_the_last_round(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of the best round, which is not the last, are made in between."""
    losses = evaluation.losses

    def rising(method: Any, engine: Any, state: Any, *rest: Any) -> Any:
        return losses(method, engine, state, *rest) | {"validation_loss": float(abs(state.round - 1))}

    monkeypatch.setattr(evaluation, "losses", rising)
    _, transport = world.apart(world.sites(), **FLORA | {"evaluation": {"transfer_clients": 0}})
    with Store.open(world.folder / "apart", writable=False) as store:
        assert store.best_round == 1
    assert any(
        p.head.kind == "grade" and p.values[OFFSET]["sha256"] != committed(world) for p in packets(transport, "ann")
    )
    assert exported_on(transport, "ann") == committed(world)
    rows = sum(len(p.tensors[OFFSET]) for p in packets(transport, "ann") if OFFSET in p.tensors)
    assert rows == 9  # those of round 2 came twice: the base was that of round 1 meanwhile


def test_a_run_that_had_stopped_exports_on_its_offset_when_it_goes_on(world: World) -> None:
    class Stopped(Interrupt):
        def stop(self, record: dict[str, Any]) -> str | None:
            return "enough" if record["round"] == 1 else None

    with pytest.raises(Interrupt.Pulled):
        world.apart(world.sites(), "apart", [Stopped(1)], **FLORA)
    transport = world.transport()
    assert experiment.resume(world.folder / "apart", (), world.opener(transport))["stopped"] == "enough"
    assert exported_on(transport, "ann") == committed(world)
