"""Sites that come, go, or do not answer: what becomes of their rows, of the means and of the best round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers.in_process_federation import NAMES, Troubled, World, metrics, names_of, rows
from helpers.sample_config import Interrupt, mira
from mira.core.errors import UserError
from mira.core.wire import decode
from mira.data.sources.sites import Sites
from mira.fleet.messages.packet import pack, unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply, Reply
from mira.fleet.server.session import Opener
from mira.runner import run as experiment
from mira.runner.progress import RunProgress


def test_a_site_that_is_away_keeps_its_row_and_comes_back(world: World) -> None:
    transport = world.transport(offline=lambda trainings: {"bob"} if trainings == 1 else set())
    experiment.run(world.experiment(), world.folder / "apart", (), world.opener(transport))
    records = metrics(world.folder / "apart")
    assert names_of(records) == [["ann", "bob", "cleo"], ["ann", "cleo"], ["ann", "bob", "cleo"]]
    assert records[2]["lost"] == {"bob": "it is not online"}
    assert records[2]["client_bytes"]["bob"] == {"down": 0, "up": 0}
    assert records[2]["bytes_down"] == sum(records[2]["client_bytes"][name]["down"] for name in ("ann", "cleo")) > 0


def test_nobody_waits_for_a_site_that_does_not_join(world: World) -> None:
    """It is asked beside the others, of whom all are enough: only the first time, before a run goes on, is it waited for."""
    with pytest.raises(Interrupt.Pulled):
        world.apart(world.sites(), "apart", [Interrupt(1)])
    asked: list[tuple[set[str], int]] = []

    class Seen(Troubled):
        def exchange(
            self, requests: Mapping[str, bytes], deadline: float, minimum: int, *more: Any
        ) -> dict[str, Reply]:  # type: ignore[override]
            asked.append(({f"{name} {unpack(data).head.kind}" for name, data in requests.items()}, minimum))
            return super().exchange(requests, deadline, minimum, *more)

    deaf = Seen(
        world.transport().inner,
        change=lambda name, request, reply: (
            NoReply("late") if (name, unpack(request).head.kind) == ("bob", "open") else reply
        ),
    )
    experiment.resume(world.folder / "apart", (), world.opener(deaf))
    assert asked[0] == ({"ann open", "bob open", "cleo open"}, 3)
    assert asked[1] == ({"ann train", "bob open", "cleo train"}, 2)
    assert all(minimum == 2 for whom, minimum in asked[1:] if "ann finish" not in whom and whom != {"bob open"})
    records = metrics(world.folder / "apart")
    assert [record["lost"] for record in records[2:]] == [{"bob": "late"}] * 2
    assert [record["client_bytes"]["bob"] for record in records[2:]] == [{"down": 0, "up": 0}] * 2


def test_a_refused_reply_is_not_one_of_those_that_are_enough(world: World) -> None:
    broken = world.transport()
    ann = broken.inner.sites["ann"]
    broken.inner = InProcessTransport({
        **broken.inner.sites,
        "ann": lambda request: ann(request)[: -3 if unpack(request).head.kind == "train" else None],
    })  # fmt: skip
    experiment.run(world.experiment(server={"minimum": 1}), world.folder / "apart", (), world.opener(broken))
    records = metrics(world.folder / "apart")
    assert names_of(records) == [["bob"]] * 3
    for record in records[1:]:
        assert record["lost"]["ann"].startswith("its reply is not a message")
        assert record["lost"]["cleo"] == "it was not waited for"


@pytest.mark.parametrize("rounds", [3, 2])
def test_a_round_does_not_wait_for_the_losses_of_who_is_training_still(world: World, rounds: int) -> None:
    """It counts with its last ones, and is measured again as soon as it answers; after the last round all are waited for."""
    late = NoReply("no reply within 5 s", busy=True)
    transport = Troubled(
        world.transport().inner,
        change=lambda name, request, reply: (
            late if (name, (head := unpack(request).head).kind, head.round) == ("bob", "train", 1) else reply
        ),
    )
    experiment.run(world.experiment(rounds=rounds), world.folder / "apart", (), world.opener(transport))
    heads = [unpack(data).head for _, data in transport.sent]
    measured = [{h.name for h in heads if (h.kind, h.round) == ("evaluate", round)} for round in range(3)]
    assert measured[:rounds] == [{*NAMES}, {"ann", "cleo"} if rounds == 3 else {*NAMES}, {*NAMES}][:rounds]
    records = metrics(world.folder / "apart")
    if rounds == 2:
        assert "unmeasured" not in records[2]
        return
    assert records[2]["unmeasured"] == {"bob": 1}
    assert records[2]["clients"]["bob"]["test_loss"] is None
    losses = [records[1 + (name != "bob")]["clients"][name]["test_loss"] for name in NAMES]
    assert records[2]["local_loss"] == pytest.approx(sum(losses) / 3)
    assert "unmeasured" not in records[3]


def test_the_matrix_only_where_sites_are_willing(world: World) -> None:
    world.apart(world.sites("unwilling"), "a")
    assert metrics(world.folder / "a")[-1]["transfer"] == {}
    experiment.run(world.experiment(), world.folder / "together")
    world.apart(world.sites("eager", allow_transfer=True), "b")
    assert metrics(world.folder / "b")[-1]["transfer"] == metrics(world.folder / "together")[-1]["transfer"]


def test_others_rows_never_travel_to_a_site_that_is_not_willing(world: World) -> None:
    """Their last rows, which the matrix tries, are sent to those who allow it and to nobody else."""
    sites = world.sites("unwilling") | {
        name: world.sites("eager", allow_transfer=True)[name] for name in ("bob", "cleo")
    }
    _, transport = world.apart(sites)
    assert metrics(world.folder / "apart")[-1]["transfer"]["names"] == ["bob", "cleo"]
    last = dict(zip(NAMES, (row.numpy().tobytes() for row in rows(world.folder / "apart").values()), strict=True))
    for name in NAMES:
        received = b"".join(data for site, data in transport.sent if site == name)
        got = {owner for owner, row in last.items() if row in received}
        assert got == ({"ann"} if name == "ann" else {"bob", "cleo"})
    for name, data in transport.sent:
        message = unpack(data)
        if name == "ann" and message.head.kind == "evaluate":
            assert len(message.tensors) == 1


def test_a_site_whose_data_changed_is_not_taken_back(world: World) -> None:
    sites = world.sites()
    with pytest.raises(Interrupt.Pulled):
        world.apart(sites, "apart", [Interrupt(1)], split={"train": 0.5, "validation": 1, "test": 1})
    file = world.data / "bob.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:6]))
    experiment.resume(world.folder / "apart", (), world.opener(world.transport()))
    records = metrics(world.folder / "apart")
    assert records[2]["lost"] == {"bob": "its data changed: it trained on 4 examples when it joined; restore it"}
    assert names_of(records) == [["ann", "bob", "cleo"], ["ann", "cleo"], ["ann", "cleo"]]


def silent(name: str, *rounds: int, kind: str = "evaluate") -> dict[str, Any]:
    """A transport that loses what ``name`` replies in these rounds, counted from 0."""

    def change(site: str, request: bytes, reply: bytes) -> Reply:
        head = unpack(request).head
        return NoReply("late") if (site, head.kind) == (name, kind) and head.round in rounds else reply

    return {"change": change}


LOSSES: dict[str, Any] = {"evaluation": {"generate": False, "transfer_clients": 0}}


def test_who_does_not_answer_counts_with_the_last_known_loss(world: World) -> None:
    heard = StringIO()
    watcher = RunProgress(Console(file=heard, width=200))
    transport = world.transport(**silent("bob", 1))
    result = experiment.run(world.experiment(**LOSSES), world.folder / "apart", [watcher], world.opener(transport))
    before, record = metrics(world.folder / "apart")[1:3]
    assert record["unmeasured"] == {"bob": 1}
    assert record["clients"]["bob"] == {"validation_loss": None, "test_loss": None, "perplexity": None}
    for mean, key in (("validation_loss", "validation_loss"), ("local_loss", "test_loss")):
        own = [(before if name == "bob" else record)["clients"][name][key] for name in NAMES]
        assert record[mean] == sum(own) / 3
    lines = [line for line in heard.getvalue().splitlines() if line.startswith("round ")]
    assert [f"validation {record['validation_loss']:.3f} (2 of 3 measured)" in line for line in lines] == [
        False,
        True,
        False,
    ]
    assert all("unmeasured" not in other for other in metrics(world.folder / "apart") if other["round"] != 2)
    assert result["best"]["round"] == 3


def test_what_is_known_of_a_silent_site_is_known_after_a_restart(world: World) -> None:
    with pytest.raises(Interrupt.Pulled):
        experiment.run(
            world.experiment(**LOSSES), world.folder / "apart", [Interrupt(1)], world.opener(world.transport())
        )
    result = experiment.resume(world.folder / "apart", (), world.opener(world.transport(**silent("bob", 1, 2))))
    records = metrics(world.folder / "apart")
    assert [record.get("unmeasured") for record in records] == [None, None, {"bob": 1}, {"bob": 1}]
    assert result["local_loss"] == records[3]["local_loss"] is not None
    assert result["clients"][1]["loss"] is None


def test_rounds_are_compared_by_the_same_clients(world: World) -> None:
    """Bob, whose loss is by far the worst, is measured from round 2 on: no round before can be the best."""

    def change(name: str, request: bytes, reply: bytes) -> Reply:
        message = unpack(reply)
        if name != "bob" or message.head.kind != "evaluate":
            return reply
        if sum(unpack(sent).head.kind == "evaluate" for site, sent in transport.sent if site == "bob") <= 2:
            return NoReply("late")
        return pack(replace(message, tensors=message.tensors | {"nll": message.tensors["nll"] + 1000}))

    transport = world.transport(change=change)
    result = experiment.run(world.experiment(**LOSSES), world.folder / "apart", (), world.opener(transport))
    records = metrics(world.folder / "apart")
    assert [record.get("unmeasured") for record in records] == [{"bob": None}, {"bob": None}, None, None]
    assert records[0]["validation_loss"] < records[2]["validation_loss"]
    assert (
        records[0]["validation_loss"] == sum(records[0]["clients"][n]["validation_loss"] for n in ("ann", "cleo")) / 2
    )
    assert result["best"]["round"] == min((2, 3), key=lambda round: records[round]["validation_loss"])


def test_answers_are_means_over_those_who_answered(world: World) -> None:
    transport = world.transport(**silent("bob", 2, kind="grade"))
    wanted = world.experiment(evaluation={"transfer_clients": 0})
    result = experiment.run(wanted, world.folder / "apart", (), world.opener(transport))
    answers = metrics(world.folder / "apart")[-1]["answers"]
    assert answers["unmeasured"] == ["bob"]
    for key in ("exact_match", "rouge_l"):
        assert result[key] == sum(answers["clients"][name][key] for name in ("ann", "cleo")) / 2
        assert answers["clients"]["bob"][key] is None


@pytest.mark.parametrize(
    ("key", "value"), [("nll", float("nan")), ("nll", float("inf")), ("nll", -1.0), ("tokens", 0), ("tokens", -1)]
)
def test_a_measurement_that_cannot_be_is_none(
    world: World, key: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    def change(name: str, request: bytes, reply: bytes) -> Reply:
        message = unpack(reply)
        if (name, message.head.kind, message.head.round) != ("ann", "evaluate", 1):
            return reply
        return pack(replace(message, tensors=message.tensors | {key: torch.full_like(message.tensors[key], value)}))

    transport = world.transport(change=change)
    experiment.run(world.experiment(rounds=2, **LOSSES), world.folder / "apart", (), world.opener(transport))
    record = metrics(world.folder / "apart")[2]
    assert record["unmeasured"] == {"ann": 1}
    assert record["validation_loss"] is not None
    assert "evaluate from ann: its losses are not those of a measurement" in caplog.text


def first_row(transport: Troubled, name: str, round: int) -> torch.Tensor:
    """What ``name`` was given to train from in ``round``, counted from 0."""
    for site, data in transport.sent:
        message = unpack(data)
        if (site, message.head.kind, message.head.round) == (name, "train", round):
            size = len(message.tensors["row0"]) // 4
            return decode(message.tensors["row0"], "fp32", size)
    raise AssertionError("it was asked for nothing")


GROUPS = {"name": "groups"}


@pytest.mark.parametrize(
    ("graph", "rank", "near"),
    [({"name": "complete"}, {}, ("ann", "cleo")), (GROUPS, {}, ("cleo",)), (GROUPS, {"bob": 1}, ("cleo",))],
    ids=["complete", "groups", "rank"],
)
def test_a_site_that_first_takes_part_in_round_3_starts_from_its_neighbours(
    world: World, graph: dict[str, str], rank: dict[str, int], near: tuple[str, ...]
) -> None:
    """Bob's first two rounds are lost. His third begins at the mean of his neighbours' rows as of the second."""
    plan: dict[str, Any] = {"graph": graph, "clients": {"rank": rank}, **LOSSES}
    data = Sites(groups={"ann": "one", "bob": "two", "cleo": "two"})
    wanted = world.experiment(**plan).model_copy(update={"data": data})
    sites = world.sites()
    away = world.transport(sites, **silent("bob", 0, 1, kind="train"))
    with pytest.raises(Interrupt.Pulled):
        experiment.run(wanted, world.folder / "apart", [Interrupt(2)], world.opener(away))
    known = rows(world.folder / "apart")
    assert len(known) == 2, "bob's row was never written"
    ann, cleo = known.values()
    start = load_file(world.folder / "apart" / "start.safetensors")["start"]
    mean = torch.stack([{"ann": ann, "cleo": cleo}[name] for name in near]).double().mean(0).float()
    assert not torch.allclose(mean, start)
    back = world.transport(sites)
    experiment.resume(world.folder / "apart", (), world.opener(back))
    given = first_row(back, "bob", 2)
    if rank:
        # Of the row's two ranks the first is his, and only that travels; he uses it with α/1 for α/2, so B is halved.
        assert len(given) == len(mean) / 2
        same = torch.isin(given, mean)
        assert 0 < int(same.sum()) < len(given)
        assert torch.isin(given[~same], mean / 2).all()
    else:
        torch.testing.assert_close(given, mean, rtol=0, atol=1e-7)
    assert names_of(metrics(world.folder / "apart"))[-1] == list(NAMES)


def test_a_method_with_a_row_of_all_starts_from_that(world: World) -> None:
    transport = world.transport(**silent("bob", 0, 1, kind="train"))
    wanted = world.experiment(method={"name": "fedit"}, **LOSSES)
    experiment.run(wanted, world.folder / "apart", (), world.opener(transport))
    assert torch.equal(first_row(transport, "bob", 2), first_row(transport, "ann", 2))


def test_a_site_issued_while_the_run_is_on_takes_its_place(world: World) -> None:
    """Nobody waits for cleo; she joins in the third round, trains in the fourth from what ann and bob are, and is counted."""
    data = Sites(expected=["cleo"])
    wanted = world.experiment(rounds=4).model_copy(update={"data": data})
    sites = world.sites()
    opener = partial(Opener, names=lambda: ("ann", "bob"), patience=0.0)
    away = world.transport(sites, offline=lambda trainings: {"cleo"})
    with pytest.raises(Interrupt.Pulled):
        experiment.run(wanted, world.folder / "apart", [Interrupt(2)], opener(away))
    here = world.transport(sites)
    result = experiment.resume(world.folder / "apart", (), Opener(here, lambda: NAMES, patience=0.0))
    mean = torch.stack([first_row(here, name, 3) for name in ("ann", "bob")]).double().mean(0).float()
    torch.testing.assert_close(first_row(here, "cleo", 3), mean, rtol=0, atol=1e-7)
    records = metrics(world.folder / "apart")
    assert names_of(records) == [["ann", "bob"]] * 3 + [["ann", "bob", "cleo"]]
    assert records[3]["lost"] == {"cleo": "it has just joined"}
    assert [record.get("unmeasured") for record in records] == [{"cleo": None}] * 3 + [None] * 2
    assert [record.get("joined") for record in records] == [None] * 3 + [{"cleo": 4}] * 2
    assert [client["examples"] for client in result["clients"]] == [4, 4, 4]
    best = min((3, 4), key=lambda round: records[round]["validation_loss"])  # the rounds that know all three
    assert result["best"]["round"] == best
    assert result["clients"][2]["loss"] is not None
    for name in NAMES:
        own = world.folder / "sites" / name / "adapter" / "adapter_model.safetensors"
        there = world.folder / "apart" / "adapters" / name / "adapter_model.safetensors"
        assert own.read_bytes() == there.read_bytes()
    assert mira("report", world.folder / "apart", "--out", world.folder / "page.html").status == 0


def test_somebody_has_to_be_there_when_a_run_begins(world: World) -> None:
    wanted = world.experiment().model_copy(update={"data": Sites(expected=list(NAMES))})
    with pytest.raises(UserError, match=r"data\.expected: names every site"):
        experiment.run(wanted, world.folder / "apart", (), world.opener(world.transport()))


def test_a_site_without_a_place_is_told_so_and_changes_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Aaron's kit is issued after round 1; his name is before all others', and their numbers stay theirs."""
    world.apart(world.sites("whole"), "whole-run", **LOSSES)
    sites = world.sites()
    with pytest.raises(Interrupt.Pulled):
        world.apart(sites, "apart", [Interrupt(1)], **LOSSES)
    more = world.transport({**sites, "aaron": sites["ann"]})
    experiment.resume(world.folder / "apart", (), Opener(more, lambda: ("aaron", *NAMES), patience=0.0))
    whole, apart = rows(world.folder / "whole-run"), rows(world.folder / "apart")
    assert whole.keys() == apart.keys()
    assert all(torch.equal(whole[name], apart[name]) for name in whole)
    assert caplog.text.count("aaron has no place in this run") == 1
    assert all(name != "aaron" for name, _ in more.sent)
