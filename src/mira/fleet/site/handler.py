"""What a site does with a request: it trains, measures and keeps what stays, and answers in numbers alone."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mira import config
from mira.adapters.pretrained import is_folder
from mira.core.errors import UserError
from mira.core.loop import screen
from mira.core.types import Work
from mira.core.wire import Wire, compress, decode, decode_mask, down, encode
from mira.data.sources.sites import Own
from mira.data.types import Source
from mira.fleet.messages.transport import Packet, pack, unpack
from mira.fleet.site.privacy import describe, epsilon, release
from mira.fleet.site.state import SiteState
from mira.runner import evaluation
from mira.serving.card import Origin
from mira.serving.folders import export_row
from mira.setup.build import open_session
from mira.setup.session import Session

log = logging.getLogger(__name__)

Values = dict[str, Any]
DEPLOYED, STAYS = "deployed", "stays"  # on the state: the job whose row is deployed, and what of it no server knows
SEE_LOG = "it failed; the reason is in the site's own log"  # what an error says may hold text or file names


class RefusedRequest(Exception):
    """Why a request cannot be done, in words that may leave the site."""


@dataclass(frozen=True)
class JoinedRun:
    """A run this site takes part in."""

    session: Session
    state: SiteState
    number: int
    start: Tensor

    @property
    def releases(self) -> int:
        """Rows with noise that left this site in this run."""
        return int((self.state.noted("releases") or {"count": 0})["count"])


@dataclass
class SiteHandler:
    """One client of a federation, where its data is. ``model``: the base model's name or folder here, None as the server
    calls it; ``state``: the folder of all it keeps; ``allow_transfer``: others' rows may be tried on its data; ``min_noise``: the
    least ``privacy.noise`` of a run it takes part in."""

    name: str
    source: Source
    state: Path
    model: str | None = None
    allow_transfer: bool = False
    threads: int | None = None
    min_noise: float = 0.0
    _opened: dict[str, JoinedRun] = field(default_factory=dict)

    def handle(self, request: bytes) -> bytes:
        """The reply to ``request``. What goes wrong is answered too; the reason in full stays in the log."""
        message = unpack(request)
        act: Callable[[Packet], tuple[Values, dict[str, Tensor]]] = {
            "open": self._open, "train": self._train, "evaluate": self._evaluate, "grade": self._grade,
            "finish": self._finish,
        }[message.head.kind]  # fmt: skip
        try:
            if message.head.name != self.name:
                raise RefusedRequest("the message is meant for another site")
            values, tensors = act(message)
        except RefusedRequest as refusal:
            log.warning("round %d: %s", message.head.round, refusal)
            values, tensors = {"failed": str(refusal)}, {}
        except UserError as error:
            log.error("%s", error)
            values, tensors = {"failed": SEE_LOG}, {}
        return pack(Packet(message.head, values, tensors))

    def _open(self, message: Packet) -> tuple[Values, dict[str, Tensor]]:
        state = SiteState.of(self.state, message.head.run)
        state.note("open", message.values)
        opened = self._run(message.head.run, message.values)
        client = opened.session.federation.clients[0]
        log.info("joined run %s", message.head.run)
        counts = {"examples": client.num_train, "releases": opened.releases}
        return {**counts, "allow_transfer": self.allow_transfer}, {}

    def _run(self, run: str, values: Values | None = None) -> JoinedRun:
        """The run's session: built when the server opens it, or again when this process is a new one."""
        state = SiteState.of(self.state, run)
        values = values or state.noted("open")
        if values is None:
            raise RefusedRequest("it has not joined this run")
        key = json.dumps(values, sort_keys=True)
        if key not in self._opened:
            self._opened.clear()  # one base model at a time
            self._opened[key] = self._build(state, values)
        return self._opened[key]

    def _build(self, state: SiteState, values: Values) -> JoinedRun:
        given = dict(values["experiment"])
        if given["model"].get("trust_remote_code"):
            raise RefusedRequest("model.trust_remote_code=true: a site runs no code that a model brings")
        for key in ("chat_template", "template_file", "template_kwargs"):
            if given["prompt"].get(key):
                raise RefusedRequest(
                    f"prompt.{key}: a template is a program; a site renders its texts with its model's own alone"
                )
        start = given["adapter"].get("start")
        if start is not None and is_folder(start):
            raise RefusedRequest(
                "adapter.start: a site reads no folder that a server names; the model hub has one for all"
            )
        if self.model is not None:
            given["model"] = given["model"] | {"name": self.model, "source": "auto", "revision": None}
        experiment = config.parse(given | {"data": {"source": "builtin"}})
        noise = 0.0 if experiment.privacy is None else experiment.privacy.noise
        if noise < self.min_noise:
            raise RefusedRequest(f"privacy.noise={noise:g} is too little: it takes part from {self.min_noise:g} on")
        if experiment.privacy is not None:
            epsilon(noise, experiment.privacy.delta, 1)  # a missing accountant is found now
        experiment = experiment.model_copy(update={"data": Own(self.source, self.name)})
        number = int(values["number"])
        threads = {"threads": self.threads or values["threads"]}
        session = open_session(experiment, threads, folder=state.folder, first=number)
        for what, ours in fingerprints(session).items():
            if values[what] != ours:
                raise RefusedRequest(
                    f"its {what} is not the server's (here {ours[:12]}, there {str(values[what])[:12]})"
                )
        # The engine is built now, so that a model it cannot compute is refused when the site joins.
        log.info("computes with the %s engine", session.environment["engine"])
        session.corpus.keep(state.folder / "tokens")
        start, rank = session.start(), values["rank"]
        return JoinedRun(session, state, number, start if rank is None else start * session.layout.within(rank))

    def _train(self, message: Packet) -> tuple[Values, dict[str, Tensor]]:
        here, values = self._run(message.head.run), message.values
        jobs, since = values["jobs"], int(values["since"])
        upload, trainable = (
            None if key not in message.tensors else decode_mask(message.tensors[key], len(here.start))
            for key in ("upload", "trainable")
        )
        wire = here.session.experiment.server.wire
        keeps = values["private_parts"] or here.session.experiment.training.keep_optimizer or wire != "fp32"
        kept = here.state.get(since) if keeps else {}
        beneath = [kept.get(f"row{j}", here.start) for j in range(len(jobs))]
        whole = partial(_whole, message, upload, down(wire))
        start = [whole(job["start"], row) for job, row in zip(jobs, beneath, strict=True)]
        anchored = any(job["anchor"] for job in jobs)
        anchor = [whole(job["anchor"], row) for job, row in zip(jobs, start, strict=True)]
        private = torch.tensor([job["private"] for job in jobs])
        work = Work(
            torch.full((len(jobs),), here.number), torch.stack(start), torch.stack(anchor) if anchored else None,
            torch.tensor([job["prox"] for job in jobs], dtype=torch.float64) if anchored else None,
            trainable, upload, private, slot=torch.arange(len(jobs)),
            optimizer={j: kept[f"optimizer{j}"] for j in range(len(jobs)) if f"optimizer{j}" in kept},
        )  # fmt: skip
        trained = screen(here.session.engine.train(work, message.head.round, float(values["lr"])))
        if trained.failed:
            raise RefusedRequest(trained.failed[0].reason)
        here.state.keep({since, *values["keep"]})
        tensors, answers, things = dict[str, Tensor](), list[Values](), dict[str, Tensor]()
        for m, j in enumerate(trained.job.tolist()):
            row = trained.rows[m]
            stays = _stays(bool(private[j]), upload, trainable, len(row))
            if values["private_parts"] and bool(stays.any()):  # of several jobs the last is deployed
                things |= {
                    f"row{j}": row.clone(),
                    DEPLOYED: torch.tensor(j),
                    STAYS: stays,
                }
            if trained.optimizer is not None:
                things[f"optimizer{j}"] = trained.optimizer[m].clone()
            if not private[j]:
                travels = slice(None) if upload is None else upload
                residual = kept.get(f"residual{j}")
                tensors[f"row{j}"], left = self._leaving(here, row[travels], start[j][travels], residual)
                things |= {} if left is None else {f"residual{j}": left}
            answers.append({
                "job": j, "examples": int(trained.examples[m]), "tokens": int(trained.tokens[m]),
                "steps": int(trained.steps[m]), "loss": float(trained.loss[m]),
            })  # fmt: skip
        if things:
            here.state.put(message.head.round + 1, things)
        log.info("round %d: trained, mean loss %.3f", message.head.round + 1, answers[-1]["loss"])
        return {"jobs": answers, "releases": here.releases}, tensors

    def _leaving(
        self, here: JoinedRun, row: Tensor, start: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The bytes in which a trained row leaves, and what rounding took away of it. In fp32 without noise it leaves as it is,
        else as its displacement: clipped, with noise, what was taken away before, and rounded."""
        wire, privacy = here.session.experiment.server.wire, here.session.experiment.privacy
        try:
            if wire == "fp32" and privacy is None:
                return encode(row, wire), None
            moved = row - start
            if privacy is not None:
                here.state.note("releases", {"count": here.releases + 1})  # it counts whatever becomes of it
                moved = release(moved, privacy.clip, privacy.noise)
            data, left = compress(moved, residual, wire)
        except ValueError as error:
            raise RefusedRequest(f"its row cannot be sent: {error}") from None
        return data, None if wire == "fp32" else left

    def _evaluate(self, message: Packet) -> tuple[Values, dict[str, Tensor]]:
        here, values = self._run(message.head.run), message.values
        rows = torch.stack([self._deployed(here, message, name) for name in values["rows"]])
        client = torch.full((len(rows),), here.number)
        scores = here.session.engine.evaluate(rows, client, values["splits"], values["limit"])
        return {}, {"nll": scores.nll, "tokens": scores.tokens}

    def _grade(self, message: Packet) -> tuple[Values, dict[str, Tensor]]:
        here, limit = self._run(message.head.run), message.values["limit"]
        row = self._deployed(here, message, "row")
        references = [here.session.corpus.references(here.number, "test", limit)]
        client = torch.tensor([here.number])
        most = message.values["max_new_tokens"]
        metrics = here.session.experiment.evaluation.metrics
        return {
            "grade": evaluation.grade(here.session.engine, row[None], client, references, limit, most, metrics)[0]
        }, {}

    def _finish(self, message: Packet) -> tuple[Values, dict[str, Tensor]]:
        here = self._run(message.head.run)
        place = self.state / "adapter"
        origin = Origin(here.session.federation.clients[0], here.session.experiment.rounds)
        export_row(here.session, place, self._deployed(here, message, "row"), origin)
        log.info("adapter written to %s", place)
        if (asked := here.session.experiment.privacy) is not None:
            log.info("privacy: %s", describe(asked.clip, asked.noise, asked.delta, here.releases))
        return {}, {}

    def _deployed(self, here: JoinedRun, message: Packet, name: str) -> Tensor:
        """The row of this name, with what stays here put into it."""
        row, kept = message.tensors[name], {}
        if message.values["private_parts"]:
            kept = here.state.get(int(message.values["since"]))
        if STAYS not in kept:
            return row
        return torch.where(kept[STAYS], kept[f"row{int(kept[DEPLOYED])}"], row)


def _whole(message: Packet, upload: Tensor | None, wire: Wire, name: str | None, beneath: Tensor) -> Tensor:
    """The row sent under ``name`` in the format ``wire``; where only a part travels, the rest is what lies ``beneath``."""
    if name is None:
        return beneath
    row = beneath.clone()
    size = len(row) if upload is None else int(upload.sum())
    row[slice(None) if upload is None else upload] = decode(message.tensors[name], wire, size, row.dtype)
    return row


def _stays(private: bool, upload: Tensor | None, trainable: Tensor | None, size: int) -> Tensor:
    """Which numbers of a row [P] are trained here and never sent."""
    everything = torch.ones(size, dtype=torch.bool)
    moves = everything if trainable is None else trainable
    if private:
        return moves
    return moves & ~(everything if upload is None else upload)


def fingerprints(session: Session) -> dict[str, str]:
    """What a site and its server must have in common: SHA-256 of the base's weights, of what its tokenizer does,
    and of the adapter that clients start from where one is given."""
    tokenizer = session.base.tokenizer
    inner = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab()))
    about = json.dumps([inner, tokenizer.chat_template, tokenizer.special_tokens_map], default=str)
    weights = f"{session.base.sha256} {session.base.quantization}"
    found = {"base model": weights, "tokenizer": hashlib.sha256(about.encode()).hexdigest()}
    if getattr(session.experiment.adapter, "start", None) is None:  # the seed gives the start, everywhere the same
        return found
    return found | {"start adapter": hashlib.sha256(session.start().numpy().tobytes()).hexdigest()}
