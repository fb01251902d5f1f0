"""A worker of a spread run: the base model and an engine in a process of its own, also on another machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from mira.config import Experiment
from mira.core.engine import Engine
from mira.core.errors import UserError
from mira.core.example_privacy import ExamplePrivacy
from mira.core.machine import Share, processor, total_memory, use_share
from mira.core.versions import version_of
from mira.data.corpus import Corpus
from mira.data.text import Encoder
from mira.engine.memory import share_heap
from mira.engine.spread import Call
from mira.model import Base, Device, load
from mira.model.shipped import ShippedBase
from mira.setup.engine import EnginePlan
from mira.setup.sending import send_tensors_as_arrays

LIBRARIES = ("mira", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Parts:
    """The parts of a worker's engine. ``experiment``: the sections that an engine reads. ``device``: that of all workers.
    ``base``: None for a base that the worker loads itself, which must have the hash ``sha256``. ``together``: workers that share
    the memory of one device. ``privacy``: train with DP-SGD."""

    experiment: Experiment
    device: Device
    base: ShippedBase | None
    sha256: str
    encoder: Encoder
    corpus: Corpus
    threads: int
    together: int
    privacy: ExamplePrivacy | None


@dataclass(frozen=True)
class About:
    """A worker's engine and machine. ``recorded``: the entries of the environment. ``full``: see ``Crew``."""

    recorded: dict[str, Any]
    full: int | None
    node: str
    processor: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Told:
    """The value of a call, and the warnings of its worker for the user."""

    value: Any
    warnings: list[str]


class _Warnings(logging.Handler):
    """Keeps warnings until they are taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())

    def told(self, value: Any) -> Told:
        kept, self._kept = self._kept, []
        return Told(value, kept)


@dataclass
class Progress:
    """Tokens computed since the last look, and messages for the user."""

    tokens: int = 0
    lock: Lock = field(default_factory=Lock)

    def add(self, tokens: int) -> None:
        with self.lock:
            self.tokens += tokens

    def take(self) -> int:
        with self.lock:
            tokens, self.tokens = self.tokens, 0
        return tokens


class Worker:
    """The methods that the run's process calls. ``gpu``: the number of a GPU of this machine; None: the one that Ray reserved, if
    any."""

    def __init__(self, parts: Parts, gpu: str | None) -> None:
        if gpu is not None:  # before CUDA starts: the worker sees this GPU alone
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        send_tensors_as_arrays()
        self._parts = parts
        self._progress, self._warnings = Progress(), _Warnings()
        logging.getLogger("mira").addHandler(self._warnings)
        self._engine: Engine | None = None

    def build(self, taken_over: Mapping[str, Any]) -> Told:
        """Build the engine, and tell ``About`` it. ``taken_over``: as for ``EnginePlan``."""
        parts = self._parts
        torch.set_num_threads(parts.threads)
        share_heap()
        if parts.together > 1:
            use_share(Share(total_memory() // parts.together, 1 / parts.together))
        base = self._loaded() if parts.base is None else parts.base.unpacked(torch.device(parts.device))
        adapter = parts.experiment.adapter.on(base, parts.experiment.seed)
        if adapter.directions is not None:  # an engine writes into these weights
            for tensor in adapter.directions.tensors.values():
                tensor.data = tensor.data.clone()
        plan = EnginePlan(
            parts.experiment, base, adapter, parts.encoder, parts.corpus, taken_over, self._progress.add, parts.privacy
        )
        self._engine = plan.build()
        recorded = plan.recorded(self._engine) | {"threads": parts.threads, "device": parts.device}
        versions = {name: version_of(name) for name in LIBRARIES}
        about = About(recorded, plan.full(self._engine), socket.gethostname(), processor(), versions)
        return self._warnings.told(about)

    def call(self, call: Call) -> Told:
        """The result of an engine's method."""
        return self._warnings.told(getattr(self._engine, call.name)(*call.arguments))

    def tokens(self) -> int:
        """The number of tokens computed since this was last asked."""
        return self._progress.take()

    def _loaded(self) -> Base:
        """The base from this machine's own files."""
        section = self._parts.experiment.model
        base = load(
            section.name, section.source, section.dtype, self._parts.device, section.trust_remote_code, section.quantization,
            section.revision,
        )  # fmt: skip
        if base.sha256 != self._parts.sha256:
            raise UserError(
                f"model.name={section.name}: {socket.gethostname()} has other weights of this name; copy them there"
            )
        return base
