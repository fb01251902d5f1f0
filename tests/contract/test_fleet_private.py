"""Differential privacy of each example over machines: noise and account are the site's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.in_process_federation import NAMES, Troubled, World, metrics
from helpers.sample_config import Interrupt
from mira.config.privacy import METRICS, Metrics, PrivacySection
from mira.core.errors import UserError
from mira.fleet.messages.packet import Head, Packet, pack, unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply
from mira.fleet.site.handler import SiteHandler
from mira.fleet.site.refusals import RefusedRequest, check_metrics
from mira.results import tables
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
    told = {"steps": 6, "noise": 1.5, "epsilon": epsilon(1.5, RATE, 6, 1e-5), "delta": 1e-5, "reported": True}
    assert result["privacy"] == records[3]["privacy"] == dict.fromkeys(NAMES, told)
    assert [sorted(record["lost"]) for record in records[1:]] == [[], ["ann"], []]
    card = (world.folder / "sites" / "bob" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"| privacy | ε = {told['epsilon']:.3g}, δ = 1e-05 for each training example, after 6 steps;" in card
    # Ann's own account after round 2 has two steps more.
    assert "of each training example, as sites last reported: ann" in tables.privacy(records[2]["privacy"])


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

    wanted, trained = world.experiment(privacy=PRIVATE, rounds=1, **QUIET), world.sites()
    transport = Troubled(InProcessTransport({name: site.handle for name, site in trained.items()}), change=note)
    experiment.run(wanted, world.folder / "apart", (), world.opener(transport))
    opened, row = seen["open"], seen["train"].tensors["row0"]
    site = world.sites("other", max_epsilon=100.0)[opened.head.name]

    def failed(site: SiteHandler, kind: Any, values: dict[str, Any], **tensors: Any) -> str | None:
        head: Head = replace(opened.head, kind=kind)
        return unpack(site.handle(pack(Packet(head, values, tensors)))).values.get("failed")

    def with_sections(**sections: Any) -> dict[str, Any]:
        given = opened.values["experiment"]
        changed = {key: given[key] | values for key, values in sections.items()}
        return opened.values | {"experiment": given | changed}

    without = {key: value for key, value in opened.values.items() if key != "trainings"}
    assert failed(site, "open", without) == "it failed; the reason is in the site's own log"
    assert "does not tell how often a site trains" in caplog.text
    # Numbers that no float holds
    for values in (opened.values | {"trainings": 10**400}, with_sections(training={"local_steps": 10**400})):
        assert failed(site, "open", values) == "trainings, training: more than 1e+09 private steps"
    many = with_sections(training={"batch_size": 10**400})
    assert "epsilon=" in str(failed(world.sites("strict", max_epsilon=0.5)[opened.head.name], "open", many))
    assert "a site draws noise of its own" in str(failed(site, "open", with_sections(privacy={"simulation": True})))
    assert "no protection for 4 examples" in str(failed(site, "open", with_sections(privacy={"delta": 0.25})))
    # A server could make any ε small by its δ.
    large = with_sections(privacy={"delta": 0.003})
    assert failed(site, "open", large) == (
        "privacy.delta=0.003 is too large for --max-epsilon: it takes part up to 0.01/4, by its 4 examples; set"
        " privacy.delta at the server, or --max-delta here"
    )
    assert failed(world.sites("lax", max_epsilon=100.0, max_delta=0.003)[opened.head.name], "open", large) is None
    assert failed(world.sites("open")[opened.head.name], "open", large) is None, "it insists on no ε"
    assert failed(site, "open", opened.values) is None
    offer = {"points": None, "split": "train", "limit": None, "since": 0, "private_parts": False}
    assert "has no noise" in str(failed(site, "choose", offer, row0=row))
    measure = {"rows": 1, "splits": ["validation", "train"], "limit": 3, "since": 0, "private_parts": False}
    assert "has no noise" in str(failed(site, "evaluate", measure, row0=row))
    assert failed(site, "evaluate", measure | {"splits": ["validation", "test"]}, row0=row) is None

    # A site that has trained prices all steps of the run by one noise; nothing of what it refuses stays.
    done = trained[opened.head.name]
    for terms in ({"privacy": {"noise": 50.0}}, {"training": {"batch_size": 1}}):
        [changed] = terms
        assert f"{changed}: not as in this run's first private step" in str(
            failed(done, "open", with_sections(**terms))
        )
    again = failed(done, "open", opened.values | {"trainings": 2})
    assert "trainings: not as in this run's first private step" in str(again)
    assert failed(done, "evaluate", measure | {"splits": ["test"]}, row0=row) is None

    # What a site would do beyond its plan is refused by its own limit, which the run has no key for.
    train = seen["train"].values
    assert failed(site, "train", train, **seen["train"].tensors) is None
    told = failed(site, "train", train | {"since": 0}, **seen["train"].tensors)
    assert told == "--max-epsilon=100 is spent"


@pytest.mark.parametrize(
    ("privacy", "options", "told"),
    [
        (PRIVATE | {"simulation": True}, {}, "sites draw noise of their own"),
        (PRIVATE, {"min_noise": 1.0}, "did not join"),
        (PRIVATE, {"max_epsilon": 2.0}, "did not join"),
        (PRIVATE | {"delta": 0.25}, {"max_epsilon": 100.0}, "did not join"),  # of 4 examples
        (PRIVATE | {"delta": 2e-6}, {"max_epsilon": 100.0, "max_delta": 1e-6}, "did not join"),
        ({"clip": 0.5, "noise": 2.0}, {"max_epsilon": 100.0}, "did not join"),
        (PRIVATE | {"metrics": "noised"}, {"privacy_metrics": "none"}, "did not join"),
    ],
)
def test_a_run_that_its_sites_refuse_does_not_begin(
    world: World, privacy: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        world.apart(world.sites(**options), privacy=privacy)


@pytest.mark.quick
def test_a_site_insists_on_what_it_tells() -> None:
    def refused(asked: Metrics | None, most: Metrics) -> str | None:
        section = None if asked is None else PrivacySection(unit="example", clip=1.0, epsilon=8.0, metrics=asked)
        try:
            check_metrics(section, most)
        except RefusedRequest as refusal:
            return str(refusal)
        return None

    assert {(asked, most) for asked in (None, *METRICS) for most in METRICS if refused(asked, most) is None} == {
        (None, "exact"), ("exact", "exact"), ("noised", "exact"), ("noised", "noised"), ("none", "exact"), ("none", "noised"),
        ("none", "none"),
    }  # fmt: skip
    assert (
        refused(None, "noised")
        == "privacy.metrics=exact tells too much: it takes part only in runs with noised or none"
    )
    assert refused("noised", "none") == "privacy.metrics=noised tells too much: it takes part only in runs with none"
