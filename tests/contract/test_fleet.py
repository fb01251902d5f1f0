"""Sites in one process: what they do to a run is what one process does, row by row to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.in_process_federation import NAMES, SECRETS, Troubled, World, lost_and_away, metrics, names_of, rows
from helpers.sample_config import Interrupt, mira
from helpers.tiny_models import save_tiny
from mira.core.errors import UserError
from mira.core.wire import Wire, decode
from mira.data.sources.jsonl import Jsonl
from mira.data.sources.sites import Own, Sites
from mira.fleet.messages.packet import PROTOCOL, Head, Packet, pack, unpack
from mira.fleet.messages.transport import InProcessTransport, NoReply, Reply
from mira.fleet.site.handler import SEE_LOG
from mira.fleet.site.privacy import epsilon
from mira.methods import METHODS
from mira.runner import run as experiment
from mira.setup.session import Session

TRAINED: dict[str, Any] = {"scaffold": {"optimizer": "sgd"}}  # it refuses AdamW


@pytest.mark.parametrize(
    ("name", "keep", "more"),
    [
        *((name, False, {}) for name in METHODS), ("mira", True, {}), ("ditto", True, {}),
        ("mira", False, {"strength": "personal"}), ("mira", False, {"strength": "similarity", "common_rounds": 1}),
    ],
)  # fmt: skip
def test_rows_and_scores_are_those_of_one_process_to_the_last_bit(
    world: World, name: str, keep: bool, more: dict[str, Any]
) -> None:
    plan: dict[str, Any] = {
        "method": {"name": name} | more,
        "training": {"keep_optimizer": keep} | TRAINED.get(name, {}),
    }
    together = experiment.run(world.experiment(**plan), world.folder / "together")
    world.apart(world.sites(), **plan)
    for a, b in zip(metrics(world.folder / "together"), metrics(world.folder / "apart"), strict=True):
        assert a.get("train_loss") == b.get("train_loss")
        assert a["clients"] == b["clients"]
        assert a.get("answers") == b.get("answers")
        assert a.get("offers") == b.get("offers")
        assert a.get("client_bytes") == b.get("client_bytes")
    for client in together["clients"]:
        own = world.folder / "sites" / client["name"] / "adapter" / "adapter_model.safetensors"
        assert own.read_bytes() == (Path(client["adapter"]) / "adapter_model.safetensors").read_bytes()
        here, there = card_in(Path(client["adapter"])), card_in(own.parent)
        assert f"| test loss | {client['loss_start']:.3f} before, {client['loss']:.3f} after |" in there
        assert there == here
        assert (own.parent / "prompt_template.jinja").is_file()


def card_in(folder: Path) -> list[str]:
    return (folder / "README.md").read_text(encoding="utf-8").splitlines()


def test_every_rounds_rows_on_the_server_are_those_of_one_process(world: World) -> None:
    experiment.run(world.experiment(), world.folder / "together")
    world.apart(world.sites())
    together, apart = rows(world.folder / "together"), rows(world.folder / "apart")
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in together)


def test_the_server_builds_no_engine(world: World) -> None:
    opener, opened_here = world.opener(world.transport()), list[Session]()

    def opening(*given: Any, **named: Any) -> Session:
        opened_here.append(opener(*given, **named))
        return opened_here[-1]

    experiment.run(world.experiment(rounds=1), world.folder / "apart", open=opening)
    assert "engine" not in vars(opened_here[0])


@pytest.mark.parametrize("name", ["ditto", "local", "fedsa-lora"])
def test_what_is_private_is_in_no_message_and_not_on_the_server(world: World, name: str) -> None:
    sites = world.sites()
    result, transport = world.apart(sites, method={"name": name})
    start = load_file(world.folder / "apart" / "start.safetensors")["start"]
    shared = {"ditto": ["000000"], "local": [], "fedsa-lora": ["000000"]}[name]
    for file, row in rows(world.folder / "apart").items():
        if file[:6] not in shared and name != "fedsa-lora":
            assert torch.equal(row, start)
    assert all(client["adapter"] is None for client in result["clients"])
    own = [
        load_file(file) for site in NAMES for file in sorted((world.folder / "sites" / site).rglob("r3.safetensors"))
    ]
    assert len(own) == len(NAMES)
    for things in own:
        last = things[f"row{int(things['deployed'])}"]
        secret = last[things["stays"] & (last != start)]
        window = secret[:8].numpy().tobytes()
        assert len(secret) >= 8
        assert not any(window in data for _, data in (*transport.sent, *transport.received))


def test_text_and_file_names_never_leave(world: World) -> None:
    _, transport = world.apart(world.sites(allow_transfer=True))
    assert len(transport.received) > 20
    everything = b"".join(data for _, data in transport.received)
    for planted in (*SECRETS.values(), str(world.folder), "jsonl", "ann.jsonl"):
        assert planted.encode() not in everything


@pytest.mark.quick
def test_what_an_error_says_stays_at_its_site(world: World, caplog: pytest.LogCaptureFixture) -> None:
    sites = world.sites()
    sites["bob"].model = str(world.folder / "secret-model")
    transport = Troubled(InProcessTransport({name: site.handle for name, site in sites.items()}))
    with pytest.raises(UserError, match="bob did not join"):
        experiment.run(world.experiment(), world.folder / "apart", (), world.opener(transport))
    everything = b"".join(data for _, data in transport.received)
    assert SEE_LOG.encode() in everything
    assert b"secret-model" not in everything
    assert "secret-model" in caplog.text


def test_a_round_of_nobody_is_not_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody of the run is online (the network is away, or a SuperLink began anew) no round passes, up to its deadline;
    who has no place in it does not count."""
    monkeypatch.setattr("mira.fleet.server.clients._PAUSE", 0.0)
    looks: list[int] = []

    def away(trainings: int) -> set[str]:
        looks.append(trainings)
        return set(NAMES) if trainings == 1 and looks.count(1) < 5 else set()

    online = {name: site.handle for name, site in world.sites().items()} | {"stranger": lambda request: b""}
    transport = Troubled(InProcessTransport(online), away)
    experiment.run(world.experiment(), world.folder / "apart", (), world.opener(transport))
    assert names_of(metrics(world.folder / "apart")) == [[*NAMES]] * 3


def test_a_reply_is_used_for_its_own_request_alone(world: World) -> None:
    """Late, doubled, of another round, under another name, broken: none of it enters a round."""
    old: dict[str, bytes] = {}

    def change(name: str, request: bytes, reply: bytes) -> Reply:
        head = unpack(request).head
        if head.kind != "train":
            return reply
        if head.round == 0:
            old[name] = reply
        if head.round == 1:
            return {"ann": old["ann"], "bob": old["ann"], "cleo": reply[:-3]}[name]
        return reply

    transport = Troubled(InProcessTransport({name: site.handle for name, site in world.sites().items()}), change=change)
    experiment.run(world.experiment(method={"name": "ditto"}), world.folder / "apart", (), world.opener(transport))
    records = metrics(world.folder / "apart")
    assert [sorted(record["lost"]) for record in records[1:]] == [[], ["ann", "bob", "cleo"], []]
    assert records[2]["lost"]["ann"] == "its reply is of round '0', asked was 1"
    assert records[2]["lost"]["bob"] == "its reply is in the name of 'ann'"
    assert records[2]["lost"]["cleo"].startswith("its reply is not a message")


def odd(**values: Any) -> Callable[[bytes], bytes]:
    """The reply with other ``values``."""
    return lambda reply: pack(replace(unpack(reply), values=unpack(reply).values | values))


def rows_made(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes], bytes]:
    """The reply with its rows changed."""

    def changed(reply: bytes) -> bytes:
        message = unpack(reply)
        return pack(replace(message, tensors={key: change(data) for key, data in message.tensors.items()}))

    return changed


ODD_JOB = {"job": 0, "examples": 4, "tokens": 10, "steps": 2, "loss": 1.0}
HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nan": (rows_made(lambda data: torch.full_like(data, 255)), "not finite"),
    "infinity": (rows_made(lambda data: torch.tensor([0, 0, 128, 127] * (len(data) // 4), dtype=torch.uint8)), "not finite"),
    "longer": (rows_made(lambda data: torch.cat([data, data[:4]])), "row0 is"),
    "flat": (rows_made(lambda data: data[None]), "row0 is"),
    "floats": (rows_made(lambda data: data.view(torch.float32)), "row0 is torch.float32, expected torch.uint8"),
    "none": (lambda reply: pack(replace(unpack(reply), tensors={})), "its reply lacks ['row0']"),
    "truncated": (lambda reply: reply[:-3], "its reply is not a message"),
    "oversized": (rows_made(lambda data: torch.zeros(2**21, dtype=torch.uint8)), "at most"),
    "garbage": (lambda reply: b"\x80\x04\x95" + reply, "its reply is"),
    "segment": (
        lambda reply: pack(replace(unpack(reply), head=replace(unpack(reply).head, segment="0" * 16))),
        "its reply is of segment",
    ),
    "jobs": (odd(jobs=[7]), "does not hold one result"),
    "no jobs": (odd(jobs={}), "does not hold one result"),
    "counts": (odd(jobs=[ODD_JOB | {"examples": 2**80}]), "are not those of a training"),
    "loss": (odd(jobs=[ODD_JOB | {"loss": None}]), "are not those of a training"),
    "weight": (odd(jobs=[ODD_JOB | {"examples": 4000}]), "it joined with"),
    "length": (odd(jobs=[ODD_JOB | {"steps": 2**40}]), "was asked for"),
}  # fmt: skip


def test_what_is_not_the_reply_asked_for_is_rejected_for_its_reason_and_the_others_are_used(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Ann sends something else wrong in each round; every message of hers but those of training is odd too."""
    wrongs = list(HOSTILE.values())

    def change(name: str, request: bytes, reply: bytes) -> Reply:
        head = unpack(request).head
        if name != "ann" or head.kind == "open":
            return reply
        return (
            wrongs[head.round][0](reply) if head.kind == "train" else odd(grade=[1])(rows_made(lambda t: t[:0])(reply))
        )

    transport = Troubled(InProcessTransport({name: site.handle for name, site in world.sites().items()}), change=change)
    asked = world.experiment(
        rounds=len(wrongs), method={"name": "fedit"}, training={"local_steps": 1},
        evaluation={"every": 100, "transfer_clients": 0},
    )  # fmt: skip
    experiment.run(asked, world.folder / "apart", (), world.opener(transport))
    records = metrics(world.folder / "apart")
    for record, (_, why) in zip(records[1:], wrongs, strict=True):
        assert sorted(record["train_loss"]) == ["bob", "cleo"]
        assert why in record["lost"]["ann"]
        assert f"round {record['round']} lost ann: {record['lost']['ann']}" in caplog.text
    assert records[-1]["clients"]["ann"]["test_loss"] is None
    assert records[-1]["clients"]["bob"]["test_loss"] < records[0]["clients"]["bob"]["test_loss"]


def test_a_reply_of_a_site_that_was_asked_nothing_changes_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    class Doubling(Troubled):
        def exchange(self, *given: Any) -> dict[str, Reply]:
            replies = super().exchange(*given)
            return replies | {"dan": replies["ann"]} if "ann" in replies else replies

    sites = InProcessTransport({name: site.handle for name, site in world.sites().items()})
    wanted = world.experiment(rounds=1, evaluation={"generate": False, "transfer_clients": 0})
    experiment.run(wanted, world.folder / "apart", (), world.opener(Doubling(sites)))
    assert sorted(metrics(world.folder / "apart")[1]["train_loss"]) == list(NAMES)
    assert "a reply from dan: rejected, it was asked nothing" in caplog.text


PRIVATE = {"clip": 0.5, "noise": 2.0}
QUIET: dict[str, Any] = {"method": {"name": "fedit"}, "evaluation": {"generate": False, "transfer_clients": 0}}


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_noise_is_put_on_at_the_site_and_every_release_counts(world: World, wire: Wire) -> None:
    """Ann's second reply is lost, and counts: what left, left. Noise of deviation 1 on every number dwarfs what was trained."""
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    transport = Troubled(InProcessTransport({name: site.handle for name, site in world.sites().items()}))
    transport.change = lambda name, request, reply: (
        NoReply("late")
        if name == "ann" and (unpack(request).head.kind, unpack(request).head.round) == ("train", 1)
        else reply
    )
    wanted = world.experiment(privacy=PRIVATE, server={"wire": wire}, **QUIET)
    result = experiment.run(wanted, world.folder / "apart", (), world.opener(transport))
    records = metrics(world.folder / "apart")
    assert records[0]["privacy"] == {name: {"releases": 0, "epsilon": 0.0, "delta": 1e-5} for name in NAMES}
    assert [record["privacy"]["bob"]["releases"] for record in records] == [0, 1, 2, 3]
    assert [record["privacy"]["ann"]["releases"] for record in records] == [0, 1, 1, 3]
    assert records[3]["privacy"]["ann"]["epsilon"] == epsilon(2.0, 1e-5, 3)
    assert result["privacy"] == records[3]["privacy"]
    row = f"ε = {epsilon(2.0, 1e-5, 3):.3g}, δ = 1e-05 for all data of the client, in its 3 uploads;"
    assert row in "\n".join(card_in(world.folder / "sites" / "bob" / "adapter"))
    page = world.folder / "page.html"
    assert mira("report", world.folder / "apart", "--out", page).status == 0
    assert f"bob ({epsilon(2.0, 1e-5, 3):.3g}, 1e-05) of 3" in page.read_text()
    start = load_file(world.folder / "apart" / "start.safetensors")["start"]
    first = unpack(next(data for name, data in transport.received if unpack(data).head.kind == "train"))
    sent = decode(first.tensors["row0"], wire, len(start))  # a displacement
    n = len(start)
    # Five standard errors of a deviation, and what a row of norm 0.5 and the int8 levels (s/√12, s ≈ 4/127) add to its square.
    assert float(sent.std()) == pytest.approx(1.0, abs=5 / (2 * n) ** 0.5 + 0.25 / n + 1e-3)


def test_noise_is_not_repeated(world: World) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    world.apart(world.sites("a"), "a-run", rounds=1, privacy=PRIVATE, **QUIET)
    world.apart(world.sites("b"), "b-run", rounds=1, privacy=PRIVATE, **QUIET)
    a, b = rows(world.folder / "a-run"), rows(world.folder / "b-run")
    assert all(not torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("away", [set(), {"ann"}], ids=["all-back", "one-away"])
def test_releases_are_counted_over_restarts(world: World, away: set[str]) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    with pytest.raises(Interrupt.Pulled):
        world.apart(world.sites(), "apart", [Interrupt(2)], privacy=PRIVATE, **QUIET)
    before = metrics(world.folder / "apart")[-1]["privacy"]
    assert all(site["releases"] for site in before.values())
    online = {name: site.handle for name, site in world.sites().items() if name not in away}
    result = experiment.resume(world.folder / "apart", (), world.opener(Troubled(InProcessTransport(online))))
    kept = {name: before[name]["releases"] for name in away}
    assert {name: site["releases"] for name, site in result["privacy"].items()} == dict.fromkeys(NAMES, 3) | kept


@pytest.mark.quick
@pytest.mark.parametrize("asked", [{}, {"privacy": PRIVATE}])
def test_a_site_insists_on_its_noise(world: World, asked: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    sites = world.sites(min_noise=3.0)
    with pytest.raises(UserError, match=r"did not join"):
        world.apart(sites, **asked)
    assert "is too little: it takes part from 3 on" in caplog.text


def test_one_process_has_no_noise(world: World) -> None:
    with pytest.raises(UserError, match="privacy: sites add the noise"):
        experiment.run(world.experiment(privacy=PRIVATE), world.folder / "together")


def test_a_row_that_went_astray_is_rejected_with_the_reason_and_the_others_are_used(world: World) -> None:
    def change(name: str, request: bytes, reply: bytes) -> Reply:
        """Ann multiplies her row by a thousand in the second round, and in the third sends what is no number."""
        head = unpack(request).head
        if name != "ann" or head.kind != "train" or head.round == 0:
            return reply
        message = unpack(reply)
        by = 1000.0 if head.round == 1 else float("nan")
        wrong = {key: (data.view(torch.float32) * by).view(torch.uint8) for key, data in message.tensors.items()}
        return pack(replace(message, tensors=wrong))

    transport = Troubled(InProcessTransport({name: site.handle for name, site in world.sites().items()}), change=change)
    experiment.run(world.experiment(method={"name": "fedit"}), world.folder / "apart", (), world.opener(transport))
    records = metrics(world.folder / "apart")
    assert [sorted(record["lost"]) for record in records[1:]] == [[], ["ann"], ["ann"]]
    assert "more than 10 times the round's median" in records[2]["lost"]["ann"]
    assert "not finite" in records[3]["lost"]["ann"]
    assert [record["lost_kind"] for record in records[1:]] == [{}, {"ann": "norm"}, {"ann": "not finite"}]


def test_a_largest_norm_of_the_configuration_is_kept(world: World) -> None:
    transport = Troubled(InProcessTransport({name: site.handle for name, site in world.sites().items()}))
    asked = world.experiment(rounds=1, server={"max_norm": 1e-9})
    experiment.run(asked, world.folder / "apart", (), world.opener(transport))
    lost = metrics(world.folder / "apart")[1]["lost"]
    assert sorted(lost) == list(NAMES)
    assert all("server.max_norm is 1e-09" in reason for reason in lost.values())


def test_a_round_whose_replies_are_lost_leaves_no_trace_at_the_sites(world: World) -> None:
    """Private rows and optimisers go on from the last round that counted, not from the last one trained."""
    plan: dict[str, Any] = {"method": {"name": "ditto"}, "training": {"keep_optimizer": True}}
    lost_and_away(world, plan)
    a, b = metrics(world.folder / "a-run"), metrics(world.folder / "b-run")
    assert a[2]["lost"].keys() == b[2]["lost"].keys() == set(NAMES)
    assert a[3]["clients"] == b[3]["clients"]


@pytest.mark.parametrize("restarted", [False, True], ids=["server", "server-and-sites"])
def test_a_server_that_died_goes_on_where_it_was(world: World, restarted: bool) -> None:
    plan: dict[str, Any] = {"method": {"name": "ditto"}, "training": {"keep_optimizer": True}}
    world.apart(world.sites("whole"), "whole-run", **plan)
    sites = world.sites()
    with pytest.raises(Interrupt.Pulled):
        world.apart(sites, "apart", [Interrupt(2)], **plan)
    again = world.sites() if restarted else sites  # new processes in the old folders
    transport = Troubled(InProcessTransport({name: site.handle for name, site in again.items()}))
    experiment.resume(world.folder / "apart", (), world.opener(transport))
    whole, resumed = metrics(world.folder / "whole-run"), metrics(world.folder / "apart")
    assert [record["clients"] for record in whole] == [record["clients"] for record in resumed]
    for site in NAMES:
        files = [world.folder / where / site / "adapter" / "adapter_model.safetensors" for where in ("whole", "sites")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("what", ["base model", "tokenizer"])
def test_a_site_with_another_model_does_not_take_part(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    other = save_tiny(tmp_path / "other", seed=int(what == "base model"))
    if what == "tokenizer":
        file = other / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    sites = world.sites()
    sites["bob"].model = str(other)
    transport = Troubled(InProcessTransport({name: site.handle for name, site in sites.items()}))
    with pytest.raises(UserError, match=r"server: bob did not join within 0 s"):
        experiment.run(world.experiment(), world.folder / "apart", (), world.opener(transport))
    assert f"bob does not take part: its {what} is not the server's" in caplog.text


def opened(world: World, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Bob's reply to the opening of a run whose values were changed."""
    values = {"protocol": PROTOCOL, "experiment": world.experiment().model_dump(mode="json"), "number": 1, "threads": 1}
    change(values)
    request = Packet(Head("open", "0" * 16, "s", 0, "bob"), values | {"rank": None}, {})
    return unpack(world.sites()["bob"].handle(pack(request))).values


def test_a_site_runs_no_code_that_a_model_brings(world: World) -> None:
    told = opened(world, lambda values: values["experiment"]["model"].update(trust_remote_code=True))
    assert told == {"failed": "model.trust_remote_code=true: a site runs no code that a model brings"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("chat_template", "{{ messages }}"), ("template_file", "/etc/hostname"), ("template_kwargs", {"mood": "x"})],
)
def test_a_site_renders_no_template_that_a_server_sends(world: World, key: str, value: object) -> None:
    """It could spell the site's texts in numbers of tokens, read its files, or never end."""
    told = opened(world, lambda values: values["experiment"]["prompt"].update({key: value}))
    assert told == {
        "failed": f"prompt.{key}: a template is a program; a site renders its texts with its model's own alone"
    }


@pytest.mark.parametrize("package", ["mira-loha 0.3", None])
def test_a_site_without_the_plug_in_of_an_adapter_says_what_to_install(world: World, package: str | None) -> None:
    def change(values: dict[str, Any]) -> None:
        values["adapter_package"] = package
        values["experiment"]["adapter"] = {"kind": "loha", "rank": 4}

    source = package or "the plug-in that the server has"
    assert opened(world, change) == {
        "failed": f"adapter.kind=loha: this site has no adapter of that kind; install {source} at the site too"
    }


@pytest.mark.parametrize("theirs", [None, PROTOCOL + 1])
def test_a_site_and_a_server_of_different_versions_refuse_each_other(world: World, theirs: int | None) -> None:
    line = f"speak different versions of MIRA's messages (here {PROTOCOL}, there {theirs}); install the same version"
    assert line in opened(world, lambda values: values.update(protocol=theirs))["failed"]

    def change(name: str, request: bytes, reply: bytes) -> Reply:
        return odd(protocol=theirs)(reply) if name == "bob" else reply

    with pytest.raises(UserError, match="server: bob did not join"):
        experiment.run(world.experiment(), world.folder / "apart", (), world.opener(world.transport(change=change)))


@pytest.mark.quick
def test_data_of_a_site_is_its_own(world: World) -> None:
    """A file of its name among others, or all that is there as one client."""
    found = Own(Jsonl(world.data), "bob").load(0)
    assert [(client.name, len(client.examples)) for client in found] == [("bob", 9)]
    alone = Own(Jsonl(world.data), "nobody").load(0)
    assert [(client.name, len(client.examples)) for client in alone] == [("nobody", 27)]


@pytest.mark.quick
def test_sites_need_their_server() -> None:
    with pytest.raises(UserError, match="run it with 'mira server'"):
        Sites().load(0)


@pytest.mark.quick
def test_the_run_folder_is_one_like_any_other(world: World) -> None:
    world.apart(world.sites())
    folder = world.folder / "apart"
    exported = mira("export", folder, "--client", "bob")
    assert exported.status == 0, exported.err
    answered = mira("generate", folder, "--client", "bob", "--prompt", "1 and 1", "--max-new-tokens", "2")
    assert answered.status == 0, answered.err
    page = mira("report", folder, "--out", world.folder / "page.html")
    assert page.status == 0, page.err
    evaluated = mira("evaluate", folder, "--json")
    assert evaluated.status == 0, evaluated.err
    assert json.loads(evaluated.out)["local_loss"] == metrics(folder)[-1]["local_loss"]
    assert "showing their last measurements" in evaluated.err
    assert (
        "which evaluated during the run; to see their results: mira report"
        in mira("evaluate", folder, "--round", "best").error
    )
    assert mira("generate", folder, "--client", "bob").error.endswith(
        "the data of 'bob' is at its site; give a --prompt"
    )


@pytest.mark.quick
def test_rows_that_stayed_cannot_be_exported(world: World) -> None:
    world.apart(world.sites(), method={"name": "local"})
    error = mira("export", world.folder / "apart", "--all").error
    assert "method.name=local keeps adapters at their sites" in error
