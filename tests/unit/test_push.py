"""Pushing to the model hub: what arrives at a hub that is a small server on this machine, and what is refused in one line."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from helpers.sample_config import NAMES, mira, write_clients, write_config

TOKEN = "hf_test"


@dataclass
class FakeHub:
    """Repositories that were made, and the files they were given. ``refuses``: a status that every request is answered with."""

    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuses: int | None = None
    address: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        if self.refuses or token != f"Bearer {TOKEN}":
            return self.refuses or 401, {"error": "no"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.private:
                return 409, {"error": "it is there", "url": f"{self.address}/{name}"}
            self.private[name] = asked["visibility"] == "private" if "visibility" in asked else asked["private"]
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            wrong = "base_model: wrong/base" in json.loads(body)["content"].replace('"', "")
            errors = [{"message": "base_model is wrong"}] if wrong else []
            return 400 if wrong else 200, {"errors": errors, "warnings": []}
        name = "/".join(path.split("/")[3:5])
        if path.startswith("/api/models/") and "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.startswith("/api/models/") and "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files.setdefault(name, {})[line["value"]["path"]] = content
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
        if method == "GET" and path.startswith("/api/models/"):
            return 200, {
                "id": name,
                "private": self.private[name],
                "siblings": [],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        return 404, {"error": f"{method} {path}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = fake.answer(self.command, self.path.split("?")[0], body, self.headers.get("Authorization"))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _any

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    fake.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("push")
    file = write_config(folder / "config.yaml", tiny_folder, write_clients(folder / "data.jsonl"))
    assert mira("run", file, "--out", folder / "run").status == 0
    return folder / "run"


def test_each_client_has_a_private_repository(hub: FakeHub, run: Path) -> None:
    ended = mira("export", run, "--all", "--push", "me/sums-{client}", "--base", "some/base")
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[len(NAMES) :] == [f"{hub.address}/me/sums-{name}" for name in NAMES]
    assert hub.private == {f"me/sums-{name}": True for name in NAMES}
    for name in NAMES:
        given, folder = hub.files[f"me/sums-{name}"], run / "adapters" / name
        assert set(given) == {file.name for file in folder.iterdir()}
        same = ("adapter_model.safetensors", "prompt_template.jinja")
        assert all(given[file] == (folder / file).read_bytes() for file in same)
        assert json.loads(given["adapter_config.json"])["base_model_name_or_path"] == "some/base"
        card = given["README.md"].decode()
        assert 'base_model: "some/base"' in card
        assert 'from_pretrained("some/base")' in card
        assert str(run.parents[1]) not in b"".join(given.values()).decode(errors="ignore"), (
            "no path of this machine leaves it"
        )


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["--format", "gguf"], {"ann.gguf", "README.md", "prompt_template.jinja"}),
        (["--merge"], {"model.safetensors", "config.json", "tokenizer.json", "README.md", "prompt_template.jinja"}),
    ],
)
def test_other_formats_are_pushed_as_well(options: list[str], files: set[str], hub: FakeHub, run: Path) -> None:
    pushed = ["--push", "me/ann", "--base", "some/base", "--public"]
    ended = mira("export", run, "--client", "ann", *options, *pushed)
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1] == f"{hub.address}/me/ann"
    assert hub.private == {"me/ann": False}
    assert files <= set(hub.files["me/ann"])
    assert str(run.parents[1]) not in b"".join(hub.files["me/ann"].values()).decode(errors="ignore")


def test_pushing_again_replaces_the_files(hub: FakeHub, run: Path) -> None:
    for base in ("some/base", "other/base"):
        assert mira("export", run, "--client", "ann", "--push", "me/ann", "--base", base).status == 0
    assert b"other/base" in hub.files["me/ann"]["README.md"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--all", "--push", "me/all", "--base", "a/b"], "--push me/all: each of the 4 clients has a repository"),
        (["--client", "ann", "--push", "ann", "--base", "a/b"], "--push ann: give OWNER/NAME"),
        (["--client", "ann", "--push", "me/a..b", "--base", "a/b"], "--push me/a..b: no name of a repository"),
        (["--client", "ann", "--push", "me/ann"], "--push: the base is /"),
        (["--client", "ann", "--push", "me/ann", "--base", "/tmp/b"], "--base /tmp/b: no name of a repository"),
        (["--client", "ann", "--public"], "export: --public needs --push OWNER/NAME"),
        (["--client", "ann", "--base", "a/b"], "export: --base needs --push OWNER/NAME"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_is_refused_before_anything_is_sent(
    options: list[str], error: str, hub: FakeHub, run: Path
) -> None:
    assert mira("export", run, *options).error.startswith(error)
    assert hub.private == {}


def refused(run: Path, base: str = "a/b") -> str:
    ended = mira("export", run, "--client", "ann", "--push", "me/ann", "--base", base)
    assert ended.status == 2
    assert "Traceback" not in ended.err
    return ended.err.splitlines()[-1]


def test_a_public_repository_gets_nothing_private(hub: FakeHub, run: Path) -> None:
    hub.private["me/ann"] = False
    assert "--push me/ann: exists and is public; give --public" in refused(run)
    assert hub.files == {}


def test_a_card_that_the_hub_does_not_take(hub: FakeHub, run: Path) -> None:
    assert "--push me/ann: the hub refuses it (" in refused(run, "wrong/base")
    assert hub.files == {}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, "the hub does not know this token; log in again: hf auth login"),
        (403, "the token may not write there; take one with write access, or another OWNER"),
        (500, "the hub refuses it ("),
    ],
)
def test_what_the_hub_refuses_is_one_line(status: int, error: str, hub: FakeHub, run: Path) -> None:
    hub.refuses = status
    assert f"--push me/ann: {error}" in refused(run)


def test_a_hub_out_of_reach_and_a_token_that_is_not_there(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "--push: HF_HUB_OFFLINE is set" in refused(run)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "log in" in refused(run)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "--push me/ann: the hub is not in reach (" in refused(run)
