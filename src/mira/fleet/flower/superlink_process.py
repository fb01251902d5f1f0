"""Flower's SuperLink, as a process that leaves out what its requests for messages do not use.

A SuperLink wraps every request in nine layers, of which six do nothing for the fleet and runtime APIs as MIRA starts it: access
control, licences and logs of the control API, event logs, traces. They take half of a small request's time. The control API keeps
all nine.
"""

from __future__ import annotations

import os
from typing import Any

from mira.fleet.flower.processes import FLOWER

os.environ |= FLOWER  # read by the imports below

from fastapi import FastAPI
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink import main as superlink
from flwr.superlink.cli import flower_superlink
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

_MESSAGES = ("/v1/fleet/", "/v1/runtime/")
# The first translates errors.
_NEEDED: list[object] = [BaseHTTPMiddleware, ProtobufTranslationMiddleware, NodeAuthMiddleware]
_create = superlink.create_app


def shortened(app: FastAPI) -> FastAPI:
    """``app`` with the needed layers alone around requests for messages. Raises RuntimeError where it lacks one of them: it is of
    another version of Flower."""
    layers = app.user_middleware
    needed = [layer for layer in layers if layer.cls in _NEEDED]
    if [layer.cls for layer in needed] != _NEEDED:
        raise RuntimeError("this version of Flower has other layers; install flwr 1.41")
    whole = app.build_middleware_stack()
    app.user_middleware = needed
    short = app.build_middleware_stack()
    app.user_middleware = layers

    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        stack: ASGIApp = short if str(scope.get("path", "")).startswith(_MESSAGES) else whole
        await stack(scope, receive, send)

    app.middleware_stack = choose
    return app


def _created(*arguments: Any, **named: Any) -> FastAPI:
    return shortened(_create(*arguments, **named))


if __name__ == "__main__":
    superlink.create_app = _created
    flower_superlink()
