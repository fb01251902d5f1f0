"""The layers that a SuperLink keeps around its requests."""

from __future__ import annotations

import asyncio

import httpx
import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from fastapi import FastAPI
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.superlink.main import create_app
from flwr.superlink.routers.control.middlewares import ControlAuthenticationMiddleware

from mira.fleet.flower.superlink_process import shortened

PULL = PullObjectRequest(node=Node(node_id=7), run_id=1, object_id="a" * 64).SerializeToString()


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that come to a layer of the control API."""
    paths, whole = list[str](), ControlAuthenticationMiddleware.dispatch

    async def dispatch(self: ControlAuthenticationMiddleware, request: object, call_next: object) -> object:
        paths.append(request.url.path)  # type: ignore[attr-defined]
        return await whole(self, request, call_next)  # type: ignore[arg-type]

    monkeypatch.setattr(ControlAuthenticationMiddleware, "dispatch", dispatch)
    return paths


def statuses(app: FastAPI, *asked: tuple[str, bytes]) -> list[int]:
    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://superlink") as client:
            head = {"content-type": "application/protobuf"}
            return [(await client.post(path, content=body, headers=head)).status_code for path, body in asked]

    return asyncio.run(ask())


def test_a_message_passes_the_needed_layers_alone_and_is_refused_without_a_proof(passed: list[str]) -> None:
    found = statuses(
        shortened(create_app()), ("/v1/fleet/pull-object", PULL), ("/v1/runtime/pull-object", PULL),
        ("/v1/fleet/pull-object", b"\xff"), ("/v1/control/list-nodes", ListNodesRequest().SerializeToString()),
    )  # fmt: skip
    assert found[:2] == [401, 401], "no node's signature, no app's token"
    assert found[2] == 400, "no protobuf"
    assert passed == ["/v1/control/list-nodes"]


def test_another_version_of_flower_is_refused() -> None:
    with pytest.raises(RuntimeError, match="other layers; install flwr"):
        shortened(FastAPI())
