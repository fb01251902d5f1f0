"""Differential privacy of each example over machines: noise and account are the site's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.in_process_federation import NAMES, Troubled, World, metrics
from helpers.sample_config import Interrupt
from mira.core.errors import UserError
from mira.fleet.messages.packet import Head, Packet, pack, unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply
from mira.runner import run as experiment
from mira.runner.callbacks import Callback
from mira.setup.accounting import epsilon

pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
PRIVATE = {"unit": "example", "clip": 0.5, "noise": 1.5}
QUIET: dict[str, Any] = {"evaluation": {"generate": False, "transfer_clients": 0}}
STEPS, RATE = 2, 2 / 4  # of a client in a round; batches of 2 of its 4 examples


def test_steps_count_at_the_site_before_they_are_done(world: World) -> None:
    """Ann's second reply is lost, and counts."""
    transport = Troubled(InProcessTransport({name: site.handle for name, site in world.sites().items()}))
    transport.change = lambda name, request, reply: (
        NoReply("late")
        if name == "ann" and (unpack(request).head.kind, unpack(request).head.round) == ("train", 1)
        else reply
    )
    wanted = world.experiment(privacy=PRIVATE, server={"wire": "bf16"}, **QUIET)
    result = experiment.run(wanted, world.folder / "apart", (), world.opener(transport))
    records = metrics(world.folder / "apart")
    assert [record["privacy"]["bob"]["steps"] for record in records] == [0, 2, 4, 6]
    assert [record["privacy"]["ann"]["steps"] for record in records] == [0, 2, 2, 6]
    told = {"steps": 6, "noise": 1.5, "epsilon": epsilon(1.5, RATE, 6, 1e-5), "delta": 1e-5}
    assert result["privacy"] == records[3]["privacy"] == dict.fromkeys(NAMES, told)
    assert [sorted(record["lost"]) for record in records[1:]] == [[], ["ann"], []]


class PulledBeforeCommit(Callback):
    """Ends the server's process, once, when round 2 is done but not committed."""

    def stop(self, record: dict[str, Any]) -> str | None:
        if record["round"] == 2:
            raise Interrupt.Pulled
        return None


def test_a_round_done_again_costs_again_and_a_spent_site_leaves(world: World) -> None:
    wanted = {"privacy": {"unit": "example", "clip": 0.5, "epsilon": 8.0}, "method": {"name": "ditto"}, **QUIET}
    with pytest.raises(Interrupt.Pulled):
        world.apart(world.sites(), "apart", [PulledBeforeCommit()], **wanted)
    # In a new process of each site: the count is on its disk.
    result = experiment.resume(world.folder / "apart", (), world.opener(world.transport()))
    records = metrics(world.folder / "apart")
    each = 2 * STEPS  # ditto trains two adapters
    assert [record["privacy"]["ann"]["steps"] for record in records] == [0, each, 3 * each, 3 * each]
    assert records[3]["lost"] == dict.fromkeys(NAMES, "privacy.epsilon=8 is spent")
    assert all(7.5 < told["epsilon"] <= 8 for told in result["privacy"].values())


@pytest.mark.quick
def test_a_site_refuses_what_would_escape_its_noise(world: World, caplog: pytest.LogCaptureFixture) -> None:
    seen: dict[str, Packet] = {}

    def note(name: str, request: bytes, reply: bytes) -> bytes:
        seen[unpack(request).head.kind] = unpack(request)
        return reply

    wanted = world.experiment(privacy=PRIVATE, rounds=1, **QUIET)
    sites = {name: site.handle for name, site in world.sites().items()}
    experiment.run(wanted, world.folder / "apart", (), world.opener(Troubled(InProcessTransport(sites), change=note)))
    opened = seen["open"]
    name = opened.head.name
    site = world.sites("other")[name]

    def refused(kind: Any, values: dict[str, Any], **tensors: Any) -> str:
        head: Head = replace(opened.head, kind=kind)
        return str(unpack(site.handle(pack(Packet(head, values, tensors)))).values["failed"])

    section = opened.values["experiment"]["privacy"]
    without = {key: value for key, value in opened.values.items() if key != "trainings"}
    assert refused("open", without) == "it failed; the reason is in the site's own log"
    assert "does not tell how often a site trains" in caplog.text
    seeded = opened.values["experiment"] | {"privacy": section | {"simulation": True}}
    assert "a site draws noise of its own" in refused("open", opened.values | {"experiment": seeded})
    assert "failed" not in unpack(site.handle(pack(opened))).values
    row = seen["train"].tensors["row0"]
    offer = {"points": None, "split": "train", "limit": None, "since": 0, "private_parts": False}
    assert "has no noise" in refused("choose", offer, row0=row)


@pytest.mark.parametrize(
    ("privacy", "options", "told"),
    [
        (PRIVATE | {"simulation": True}, {}, "sites draw noise of their own"),
        (PRIVATE, {"min_noise": 1.0}, "did not join"),
        (PRIVATE, {"max_epsilon": 2.0}, "did not join"),
        (PRIVATE | {"delta": 0.25}, {"max_epsilon": 100.0}, "did not join"),  # of 4 examples
        ({"clip": 0.5, "noise": 2.0}, {"max_epsilon": 100.0}, "did not join"),
    ],
)
def test_a_run_that_its_sites_refuse_does_not_begin(
    world: World, privacy: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        world.apart(world.sites(**options), privacy=privacy)
