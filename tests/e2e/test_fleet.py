"""Real processes on loopback: SuperLink, gate, certificates, sites, a tiny model; and all that sites send is recorded."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file

pytest.importorskip("flwr", reason="needs Flower: pip install 'mira-fl[flower]'")

from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node

from helpers.federation_processes import BESIDE, NAMES, PATIENCE, Federation, children_of, free_port, kept, write_data
from helpers.mitm import wiretap
from helpers.sample_config import mira, settings
from helpers.tunnel import tunnel
from mira.fleet.flower import frames
from mira.fleet.gate import proxy as gate
from mira.fleet.identity import certificates, join, key_files, kit, registry
from mira.fleet.identity.signatures import signed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("fleet")
    made = Federation(folder, free_port(), free_port())
    server = kit.make_server(folder / "server-kit", f"127.0.0.1:{made.gate}", days=2)
    for k, name in enumerate(NAMES):
        made.issue(name)
        write_data(folder, k, name)
    plan: dict[str, Any] = settings(
        tiny_folder, folder / "all", engine={"threads": 1, "tokens_per_pass": 1}, graph={"name": "complete"},
        evaluation={"generate": False, "transfer_clients": 0, "every": 3},
        server={"wire": "fp32"},
    )  # fmt: skip
    plan["data"] = {"source": "jsonl", "path": str(folder / "all")}
    (folder / "c.yaml").write_text(json.dumps(plan))
    here = ("127.0.0.1", made.tap)
    with wiretap(
        here, server.certificate, server.key, ("127.0.0.1", made.gate), folder / "server-kit" / "ca.pem"
    ) as heard:
        made.heard = heard
        try:
            yield made
        finally:
            made.stop(*made.started)
    end = time.monotonic() + 20  # what a process that was killed leaves behind looks for its parent now and then
    while children_of(folder) and time.monotonic() < end:
        time.sleep(0.5)
    assert children_of(folder) == []


@contextmanager
def expired(folder: Path) -> Iterator[int]:
    """A server of this federation, but its certificate expired a week ago; its port."""
    server = folder / "server-kit"
    authority = certificates.Signed((server / "ca.pem").read_bytes(), (server / "ca.key").read_bytes())
    past = datetime.now(UTC) - timedelta(days=9)
    found = certificates.new_server(authority, "127.0.0.1", past, 2, (server / "server.key").read_bytes())
    (folder / "expired.pem").write_bytes(found.certificate)
    tls = gate.server_tls(folder / "expired.pem", server / "server.key")
    inside = gate.Upstream(("127.0.0.1", free_port()))
    with gate.opened(("127.0.0.1", 0), inside, tls, lambda headers: "anybody", gate.Limits()) as door:
        yield door.address[1]


def lapse(server: Path, name: str) -> None:
    """Let the admission of a site have ended a minute ago."""
    past = registry.stamp(datetime.now(UTC) - timedelta(minutes=1))
    with key_files.locked(server):
        address, sites = registry.read_registry(server)
        ended = tuple(replace(site, expires=past) if site.name == name else site for site in sites)
        registry.commit(server, address, ended)


def test_who_is_refused(federation: Federation) -> None:
    """Strangers, the revoked, the expired and the careless come while one site joins: nobody but the admitted is ever online."""
    folder, port = federation.folder, federation.gate
    kit.make_server(folder / "other-kit", f"127.0.0.1:{port}", days=2)
    federation.issue(NAMES[1], "foreign-kit", "other-kit")
    federation.issue("gone")
    kit.revoke(folder / "server-kit", "gone")
    federation.issue("lapsed")
    lapse(folder / "server-kit", "lapsed")
    federation.issue("visitor", called=NAMES[1])  # its own key under another's name
    federation.server("server", "c.yaml", "--out", "never")
    federation.until("server", "sites may connect")
    trust, key = ("--root-certificates", "server-kit/ca.pem"), "--auth-supernode-private-key"
    with expired(folder) as late:
        federation.issue("late", port=late)
        kit.revoke(folder / "server-kit", "late")  # no run waits for it
        untrusted = "the certificate of the server there is refused"
        for name, why in (
            ("gone", "does not admit this kit's key: it is revoked, expired"),
            ("lapsed", "does not admit this kit's key: it is revoked, expired"), ("foreign", f"{untrusted} ("),
            ("late", f"{untrusted} (certificate has expired)"),
        ):  # fmt: skip
            told = mira(
                "client", "--kit", folder / f"{name}-kit", "--data", folder / "all", "--state", folder / "no-state"
            )
            assert why in told.error
            assert not (folder / "no-state").exists(), "it is told before anything begins"
        federation.node("expired", *trust, key, f"{NAMES[0]}-kit/site.key", address=late)
        federation.node("no-key", *trust)
        federation.node("unregistered", *trust, key, "foreign-kit/site.key")
        federation.node("revoked", *trust, key, "gone-kit/site.key")
        federation.node("plain", "--insecure")
        federation.node("foreign-server", "--root-certificates", "other-kit/ca.pem", key, f"{NAMES[0]}-kit/site.key")
        unknown, unproven = "The server does not admit this node key", "certificate verify failed"
        for name, why in {
            "expired": f"{unproven}: certificate has expired", "foreign-server": f"{unproven}: unable to get local issuer",
            "no-key": unknown, "unregistered": unknown, "revoked": unknown, "plain": "Giving up reconnection",
        }.items():  # fmt: skip
            federation.gave_up(name, why)
    assert "online" not in federation.log("server").replace("not online", "")
    # One site is let in, and a visitor who has a key of his own and says he is another.
    federation.site(NAMES[0])
    federation.site("visitor", NAMES[1])
    federation.until("server", rf"online: {NAMES[0]}, visitor \(2 of 4\)")
    federation.until("server", "visitor does not take part: the message is meant for another site")
    federation.until("server", f"waiting for {NAMES[1]}, {NAMES[2]}, visitor")
    attack(federation)
    worker_is_its_users_alone(federation)
    kit.revoke(folder / "server-kit", "visitor")
    federation.until("server", "without visitor: revoked before the run began")
    federation.refused("visitor", "does not admit this kit's key: it is revoked")
    assert f"online: {NAMES[0]}, {NAMES[1]}" not in federation.log("server")
    keys = federation.held("server")
    assert keys.stat().st_mode & 0o777 == 0o700
    federation.stop("server", NAMES[0])
    assert federation.started["server"].returncode == 130
    assert not keys.exists(), "with the key of the SuperLink"
    kept(federation)


def attack(federation: Federation) -> None:
    """What a site can do with its kit but what a site is for: nothing, though it knows another's number."""
    folder = federation.folder
    *_, victim = re.findall(r"SuperNode ID: (\d+)", (folder / f"{NAMES[0]}-state" / "node.log").read_text())
    *_, own = re.findall(r"SuperNode ID: (\d+)", (folder / "visitor-state" / "node.log").read_text())

    def post(path: str, body: bytes = b"") -> int:
        proof = signed((folder / "visitor-kit" / "site.key").read_bytes(), datetime.now(UTC))
        headers = proof | {"content-type": "application/protobuf"}
        return client.post(f"https://127.0.0.1:{federation.gate}{path}", content=body, headers=headers).status_code

    def pushed(sender: str, question: str, to: int) -> bytes:
        about = Metadata(
            run_id=1, message_id="a" * 64, src_node_id=int(sender), dst_node_id=to, reply_to_message_id=question,
            ttl=60.0, created_at=time.time(), message_type="query",
        )  # fmt: skip
        request = PushMessagesRequest(node=Node(node_id=int(own)), messages_list=[Message(metadata=about)])
        return bytes(request.SerializeToString())

    with httpx.Client(verify=federation.trust, trust_env=False, timeout=PATIENCE) as client:
        for path in (
            "/", "/docs", "/openapi.json", "/v1/control/start-run", "/v1/control/list-runs", "/v1/control/list-nodes",
            "/v1/control/register-node", "/v1/control/stop-run", "/v1/runtime/push-messages", "/v1/runtime/pull-messages",
            "/v1/runtime/get-nodes", "/v1/runtime/pull-object", "/v1/fleet/../control/start-run",
        ):  # fmt: skip
            assert post(path) == 404, path
        push, pull = "/v1/fleet/push-messages", "/v1/fleet/pull-messages"
        assert post(pull, PullMessagesRequest(node=Node(node_id=int(own))).SerializeToString()) == 200
        assert post(pull, PullMessagesRequest(node=Node(node_id=int(victim))).SerializeToString()) == 401
        assert post(push, pushed(victim, "b" * 64, to=1)) == 403, "an answer in another's name"
        assert post(push, pushed("1", "", to=int(victim))) == 403, "an instruction as if by the server"
    # Flower's own tool: no job is taken from a site.
    (folder / "app").mkdir()
    (folder / "app" / "pyproject.toml").write_text(APP)
    (folder / "visitor-home").mkdir()
    connection = f'[superlink.fleet]\naddress = "127.0.0.1:{federation.gate}"\nroot-certificates = "{folder}/server-kit/ca.pem"\n'
    (folder / "visitor-home" / "config.toml").write_text(connection)
    federation.start(
        "job", BESIDE / "flwr", "run", "app", "fleet", "--format", "json", FLWR_HOME=str(folder / "visitor-home")
    )
    federation.started["job"].wait(PATIENCE)
    said = federation.log("job")
    assert '"success": false' in said
    assert "'404 ' for url" in said, said
    assert "/v1/control/start-run" in said, said


APP = """\
[project]
name = "job"
version = "1.0.0"
description = "A job that nobody here may submit"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "visitor"
[tool.flwr.app.components]
serverapp = "mira.fleet.flower:server_app"
clientapp = "mira.fleet.flower:client_app"
"""


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def worker_is_its_users_alone(federation: Federation) -> None:
    """Nobody else enters its socket or its folder, and a pickle is nothing to it."""
    name = NAMES[0]
    [line] = [line for line in children_of(federation.folder) if f"mira.fleet.site.worker --name {name} " in line]
    found = re.search(r"--socket (\S+)", line)
    assert found is not None
    path = Path(found[1])
    modes = {item: item.stat().st_mode & 0o777 for item in (path, path.parent, federation.folder / f"{name}-state")}
    assert list(modes.values()) == [0o600, 0o700, 0o700], modes
    marker = federation.folder / "exploded"
    for bomb in (pickle.dumps(Bomb(marker)), b"\x00" * 8, b"\xff" * 100):
        with frames.connect(path, PATIENCE) as worker:
            frames.send(worker, bomb)
            with pytest.raises(frames.Closed):
                frames.receive(worker)
    pickle.loads(pickle.dumps(Bomb(federation.folder / "proof")))  # the control: such a bomb goes off where one is read
    assert (federation.folder / "proof").exists()
    assert not marker.exists()
    assert federation.log(name).count("a request was not answered") == 3
    assert federation.log(name).count("the worker is ready") == 1


def result(federation: Federation) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((federation.folder / "run" / "result.json").read_text())
    return whole


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_three_sites_one_killed_and_the_server_too(federation: Federation) -> None:
    """The rows are those of one process, to the last bit, whoever died on the way, whose key was replaced, and who is behind a
    proxy; and nothing but they and numbers left."""
    folder, secret = federation.folder, "user:s3cret"
    with tunnel(folder, "--credentials", secret) as proxy:
        around = {"HTTPS_PROXY": f"http://{secret}@127.0.0.1:{proxy.port}", "NO_PROXY": "", "no_proxy": ""}
        three_sites(federation, around)
        assert set(proxy.lines) == {f"127.0.0.1:{federation.tap}"}
    assert f"{NAMES[0]}: through the proxy 127.0.0.1:{proxy.port}" in federation.log(NAMES[0])
    for log in folder.rglob("*.log"):
        assert "s3cret" not in log.read_text(), log


ROUNDS = 12  # so many that the server is watched and killed before the last


def watch(federation: Federation, port: int) -> None:
    """The server is watched while it runs, and by some who mean it harm; nothing of it reaches the run."""
    url, kit_folder = f"http://127.0.0.1:{port}", federation.folder / "server-kit"
    with ExitStack() as stack:
        for _ in range(8):  # never a whole request
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            slow.sendall(b"GET /metrics HTTP/1.1\r\nx: ")
        client = stack.enter_context(httpx.Client(trust_env=False, timeout=PATIENCE))
        told = client.get(f"{url}/healthz")
        found = dict(line.rsplit(" ", 1) for line in client.get(f"{url}/metrics").text.splitlines())
        page = client.get(f"{url}/").text
        assert client.get(f"{url}/{'a' * 60_000}").status_code in (404, 431)
        assert client.get(f"{url}/metrics", headers={"host": "rebound.example"}).status_code == 421
    assert (told.status_code, told.json()["reason"], told.json()["online"]) == (200, None, 3)
    assert [found[f"mira_{name}"] for name in ("rounds_planned", "sites_online", "healthy")] == [
        f"{ROUNDS}.0",
        "3.0",
        "1.0",
    ]
    done = found["mira_rounds_total"]
    assert 1 <= float(done) < ROUNDS
    for name in NAMES:
        assert found[f'mira_site_replies_total{{outcome="accepted",site="{name}"}}'] == done
        assert time.time() - float(found[f'mira_site_last_seen_timestamp_seconds{{site="{name}"}}']) < PATIENCE
    assert float(found["mira_superlink_process_resident_memory_bytes"]) > 2**20
    assert "Loss over rounds" in page
    assert f"run and {url}/metrics" in mira("server", "status", kit_folder).out


def three_sites(federation: Federation, proxy: dict[str, str]) -> None:
    folder = federation.folder
    nowhere = f"http://127.0.0.1:{free_port()}"  # Flower's processes at the server speak with loopback alone
    watched = free_port()
    options = ("c.yaml", "--set", f"rounds={ROUNDS}", "--out", "run", "--metrics", watched)
    federation.server("first", *options, HTTPS_PROXY=nowhere, NO_PROXY="", no_proxy="")
    federation.site(NAMES[0], **proxy)
    for name in NAMES[1:]:
        federation.site(name)
    federation.until("first", r"online: .*\(3 of 3\)")
    federation.until("first", rf"round 1/{ROUNDS}")
    watch(federation, watched)
    # The server dies without a word, and a site's worker too.
    federation.started["first"].send_signal(signal.SIGKILL)
    federation.started["first"].wait()
    shutil.rmtree(federation.held("first"))  # with SIGKILL nobody else does
    pid = int(re.findall(r"worker is ready \(process (\d+)\)", federation.log(NAMES[1]))[-1])
    os.kill(pid, signal.SIGKILL)
    # A key is replaced while no round is under way: a round that begins while its node starts again may lose the site.
    site = folder / f"{NAMES[2]}-kit"
    federation.admit(join.join_again(site), site)
    federation.until(NAMES[2], "goes on with its new key")
    told = mira("server", "status", folder / "server-kit").out
    [done] = re.findall(rf"the server has ended; (\d+) of {ROUNDS} rounds done, not finished", told)
    federation.server("again", "--resume", "run", "--log-format", "json")
    federation.until("again", r"online: .*\(3 of 3\)")
    federation.until("again", r"best round")
    assert federation.started["again"].wait(PATIENCE) == 0
    assert result(federation)["lost"] == 0
    lines = [line for line in federation.log("again").splitlines() if line.startswith("{")]
    assert federation.log("again").startswith("\n".join(lines)), (
        "the table on standard output, and nothing else, follows"
    )
    assert {json.loads(line).get("round") for line in lines} >= {None, *range(int(done) + 1, ROUNDS + 1)}
    told = mira("server", "status", folder / "server-kit").out
    assert f"the server has ended; {ROUNDS} of {ROUNDS} rounds done, finished" in told
    assert len(re.findall(rf"^hospital-\d +\? +\? +{ROUNDS} +0 +0 +0 +0 ", told, flags=re.MULTILINE)) == 3, (
        "accepted in each round"
    )
    assert mira("run", folder / "c.yaml", "--set", f"rounds={ROUNDS}", "--out", folder / "together").status == 0
    for name in NAMES:
        own = adapter(folder / f"{name}-state" / "adapter")
        assert own == adapter(folder / "run" / "adapters" / name)
        assert own == adapter(folder / "together" / "adapters" / name)
    assert f"{NAMES[2]} does not take part" not in federation.log("again"), "it is known under its new key"
    keys = [entry for entry in registry.read_registry(folder / "server-kit")[1] if entry.name == NAMES[2]]
    assert [entry.revoked is None for entry in keys] == [False, True]
    assert "superlink_process" in federation.log("first")
    size = load_file(folder / "run" / "start.safetensors")["start"].nbytes
    assert sum(map(len, federation.heard)) > len(NAMES) * ROUNDS * size, "what was trained passed the tap"
    kept(federation)
