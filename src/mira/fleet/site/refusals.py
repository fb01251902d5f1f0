"""Reasons for which a site does not do what a server asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mira.config.sections import SECTIONS
from mira.core.pydantic_config import is_folder


class RefusedRequest(Exception):
    """The reason for which a request cannot be done, in words that may leave the site."""


def check_sources(given: Mapping[str, Any]) -> None:
    """Raises RefusedRequest where an experiment brings code of its own, or names a folder of this site."""
    if given["model"].get("trust_remote_code"):
        raise RefusedRequest("model.trust_remote_code=true: a site runs no code that a model brings")
    for key in ("chat_template", "template_file", "template_kwargs"):
        if given["prompt"].get(key):
            raise RefusedRequest(
                f"prompt.{key}: a template is a program; a site renders its texts with its model's own alone"
            )
    start = given["adapter"].get("start")
    if start is not None and is_folder(start):
        raise RefusedRequest("adapter.start: a site reads no folder that a server names; the model hub has one for all")


def check_adapter(given: Mapping[str, Any], package: str | None) -> None:
    """Raises RefusedRequest where the adapter's kind is a plug-in, of ``package`` at the server, that this site cannot use."""
    adapters = SECTIONS["adapter"]
    kind = str(given[adapters.tag])[:80]
    if adapters.fault(kind) is not None:
        raise RefusedRequest(f"adapter.{adapters.tag}={kind}: its plug-in is broken here; see the site's own log")
    if kind not in adapters:
        source = str(package)[:80] if package else "the plug-in that the server has"
        raise RefusedRequest(
            f"adapter.{adapters.tag}={kind}: this site has no adapter of that kind; install {source} at the site too"
        )
