"""``adapter.start``: an existing PEFT adapter, from a folder or the model hub, as the common start of all clients."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx  # what huggingface_hub's network errors are made of
import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mira.adapters.peft_files import BASE, CONFIG, PICKLED, PROMPT_ROW, WEIGHTS, recorded_sha256
from mira.adapters.types import BaseLike
from mira.core.errors import UserError
from mira.core.pydantic_config import expanded

log = logging.getLogger(__name__)

HUB_TIMEOUT = 5.0  # seconds after which a silent hub counts as out of reach
_FILES = [CONFIG, WEIGHTS, PROMPT_ROW, BASE]
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Pretrained:
    """A PEFT adapter that was ``given`` as adapter.start. ``settings``: its adapter_config.json; ``trained_on_sha256``:
    the hash of its base's weights, where the folder records it."""

    given: str
    folder: Path
    settings: Mapping[str, Any]
    trained_on_sha256: str | None

    @staticmethod
    def find(given: str) -> Pretrained:
        """The adapter in a folder, in the local hub cache, or on the model hub. Raises UserError."""
        place = expanded(Path(given))
        folder = place if place.is_dir() else _from_hub(given)
        if not (folder / CONFIG).is_file():
            raise refused(given, f"holds no {CONFIG}; give a folder that PEFT's save_pretrained or mira export wrote")
        if not (folder / WEIGHTS).is_file():
            if (folder / PICKLED).is_file():
                raise refused(
                    given,
                    f"{PICKLED} is not read, as it may run code; save the adapter again with PEFT's save_pretrained",
                )
            raise refused(given, f"holds no {WEIGHTS}; save the adapter again with PEFT's save_pretrained")
        try:
            settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            with safe_open(folder / WEIGHTS, framework="pt"):
                sha256 = recorded_sha256(folder)
        except (ValueError, OSError, SafetensorError) as error:
            raise refused(given, f"cannot be read ({_line(error)}); save it again") from None
        if not isinstance(settings, dict):
            raise refused(given, f"its {CONFIG} is no mapping; save it again")
        return Pretrained(given, folder, settings, sha256)

    def refused(self, reason: str) -> UserError:
        """The error for this adapter, in one line."""
        return refused(self.given, reason)

    def check(self, kind: str, base: BaseLike) -> None:
        """Raise UserError where it is of another kind of PEFT's than ``kind``, or was trained on another base."""
        if self.settings.get("peft_type") != kind:
            raise self.refused(
                f"is {self.settings.get('peft_type')}, and the run's adapter.kind is {kind} in PEFT; set adapter.kind, or give"
                " another adapter"
            )
        self._check_base(base)

    def _check_base(self, base: BaseLike) -> None:
        """The base by its weights where the folder records them, else by its name on the hub; a warning where neither
        can be compared."""
        recorded = None if base.source == "memory" else self.trained_on_sha256
        if recorded == base.sha256:
            return
        trained_on = str(self.settings.get("base_model_name_or_path") or "")
        if recorded is not None:
            raise self.refused(
                f"was trained on other weights ({trained_on}, SHA-256 {recorded[:12]}) than those of model.name={base.name}"
                f" (SHA-256 {base.sha256[:12]}); set model.name to that model"
            )
        if not all(_ON_HUB.fullmatch(name) and not Path(name).is_dir() for name in (trained_on, base.name)):
            log.warning(
                "adapter.start=%s: nothing tells whether it was trained on model.name=%s (its %s says '%s'); its tensors fit",
                self.given, base.name, CONFIG, trained_on,
            )  # fmt: skip
        elif trained_on.rsplit("/", 1)[-1].lower() != base.name.rsplit("/", 1)[-1].lower():
            raise self.refused(
                f"was trained on '{trained_on}', not on model.name={base.name}; set model.name={trained_on}, or correct"
                f" base_model_name_or_path in its {CONFIG} where the weights are the same"
            )

    def finite(self, row: Tensor) -> Tensor:
        """``row``. Raises UserError where a number of it is not finite."""
        if not bool(torch.isfinite(row).all()):
            raise self.refused("holds numbers that are not finite; give another adapter")
        log.info("adapter.start=%s: all clients start from this adapter", self.given)
        return row


def refused(given: str, reason: str) -> UserError:
    """The error for the adapter that was ``given``."""
    return UserError(f"adapter.start={given}: {reason}")


def _from_hub(name: str) -> Path:
    if name.startswith((".", "/", "~")) or not _ON_HUB.fullmatch(name):
        raise refused(name, "no such folder; give a folder with a PEFT adapter, or OWNER/NAME on the model hub")
    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
        if (cached / CONFIG).is_file() and (cached / WEIGHTS).is_file():
            return cached
    except (HFValidationError, OSError):
        pass
    if huggingface_hub.is_offline_mode():
        raise refused(
            name, "no such folder, not in the local hub cache, and the hub is not asked, as HF_HUB_OFFLINE or"
            " TRANSFORMERS_OFFLINE is set; unset it, or give a folder"
        )  # fmt: skip
    try:
        # A short request first: the download itself retries for a long time where the hub is out of reach.
        about = huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
        files = {file.rfilename for file in about.siblings or ()}
        if PICKLED in files and WEIGHTS not in files:
            raise refused(name, f"has {PICKLED} alone, which is not read, as it may run code; give another adapter")
        log.info("fetching %s from the model hub", name)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except RepositoryNotFoundError:
        reason = "no such folder, and the hub has no adapter of this name that may be read without logging in"
        raise refused(name, f"{reason}; check the name, or log in: hf auth login") from None
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        raise refused(name, f"no such folder, and the hub is not in reach ({_line(error)}); give a folder") from None


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
