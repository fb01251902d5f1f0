"""Upload of folders to the model hub, each to its own repository, with the user's token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx  # what huggingface_hub's network errors are made of
import huggingface_hub
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from mira.core.errors import UserError
from mira.model.files import first_line
from mira.serving.bases import base_name, hub_name
from mira.serving.card import CARD
from mira.setup.session import Session

CLIENT = "{client}"

_BASE_NAMED = {"adapter_config.json": "base_model_name_or_path", "base_model.json": "name"}  # files that name the base


@dataclass(frozen=True)
class Hub:
    """Target of a push. ``name``: OWNER/NAME, where {client} stands for a client's name. ``base``: the base's name there."""

    name: str
    public: bool = False
    base: str | None = None

    def repository(self, client: str) -> str:
        return self.name.replace(CLIENT, client)

    def check(self, clients: Sequence[str]) -> None:
        """Raise UserError where the name cannot name a repository for each client."""
        if len(clients) > 1 and CLIENT not in self.name:
            raise UserError(
                f"--push {self.name}: each of the {len(clients)} clients has a repository of its own; put {CLIENT} into the name,"
                f" as in {self.name}-{CLIENT}"
            )
        if self.name.count("/") != 1:
            raise UserError(f"--push {self.name}: give OWNER/NAME, the user or organisation and the repository")
        named = [("--push", self.repository(client)) for client in clients]
        for option, name in [*named, ("--base", self.base)]:
            try:
                validate_repo_id(name or "given/elsewhere")
            except HFValidationError as error:
                raise UserError(f"{option} {name}: no name of a repository ({first_line(error)})") from None
        if huggingface_hub.is_offline_mode():
            raise UserError("--push: HF_HUB_OFFLINE is set, so the hub is not asked; unset it")

    def push(self, folder: Path, client: str, changed: Mapping[str, str]) -> str:
        """Upload ``folder`` to the repository of ``client``, which is created where it does not exist. ``changed``: texts that
        replace those of its files. Returns the address; raises UserError."""
        name = self.repository(client)
        api = huggingface_hub.HfApi()
        try:
            address = api.create_repo(name, private=not self.public, exist_ok=True)
            if not self.public and not api.model_info(name).private:
                raise UserError(f"--push {name}: exists and is public; give --public where everybody may read it")
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            contents = {
                str(file.relative_to(folder)): changed.get(str(file.relative_to(folder)), file) for file in files
            }
            added = [_added(path, content) for path, content in contents.items()]
            api.create_commit(name, added, commit_message="Adapter trained with MIRA")
        except LocalTokenNotFoundError:
            raise UserError(
                f"--push {name}: no token for the hub is stored here; log in first: hf auth login"
            ) from None
        except ValueError as error:  # the hub refuses the card
            raise UserError(f"--push {name}: the hub refuses it ({' '.join(str(error).split())})") from None
        except HfHubHTTPError as error:
            raise UserError(f"--push {name}: {_reason(error)}") from None
        except (httpx.HTTPError, OSError) as error:
            raise UserError(f"--push {name}: the hub is not in reach ({first_line(error)}); push again later") from None
        return str(address)


def base(hub: Hub, session: Session) -> str:
    """The name of the base on the hub. Raises UserError where none is given or known."""
    name = hub.base or hub_name(session)
    if name is None:
        raise UserError(
            f"--push: the base is {base_name(session)}, which is on this machine alone; give its name on the hub with --base"
        )
    return name


def push(hub: Hub, place: Path, card: str, base: str) -> str:
    """Push the folder of a client. ``base`` replaces the base's name, which may be a folder of this machine."""
    changed = {CARD: card}
    for file, key in _BASE_NAMED.items():
        if (place / file).is_file():
            values = json.loads((place / file).read_text(encoding="utf-8")) | {key: base}
            changed[file] = json.dumps(values, indent=2, sort_keys=True)
    return hub.push(place, place.name, changed)


def _added(path: str, content: str | Path) -> CommitOperationAdd:
    return CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)


def _reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        return "the hub does not know this token; log in again: hf auth login"
    if status == 403:
        return "the token may not write there; take one with write access, or another OWNER"
    return f"the hub refuses it ({first_line(error)})"
