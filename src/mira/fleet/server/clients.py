"""The clients of a run over machines: each site gets its part of the work, and every site that answers in time takes part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mira.core.best_round import UNMEASURED, Standing, standing
from mira.core.engine import Grade
from mira.core.errors import UserError
from mira.core.payload import jobs_of
from mira.core.types import Offer, Scores, Trained, Work
from mira.core.wire import Wire
from mira.fleet.messages.packet import Head, Packet, RequestKind, other_protocol, pack, row_key
from mira.fleet.messages.policy import RemoteRun, RoundPolicy
from mira.fleet.messages.replies import column, grade_of, is_count, read_reply
from mira.fleet.messages.transport import NoReply, Reply, Transport
from mira.fleet.server.offset import OffsetOfSites
from mira.fleet.server.requests import (
    Request,
    Values,
    addressed,
    astray,
    choice_request,
    evaluation_request,
    scores_of,
    stragglers,
    training_request,
    training_results,
    unasked,
)  # fmt: skip
from mira.fleet.site.account import spent

log = logging.getLogger(__name__)

_PAUSE = 2.0  # seconds between two looks at the sites online


@dataclass
class RemoteClients:
    """The sites of a run, as the engine and the client backend of its server. ``size``: P. ``watch``: called with the name of a
    site and a line for people whenever a reply comes."""

    run: RemoteRun
    transport: Transport
    policy: RoundPolicy
    size: int
    watch: Callable[[str, str], None] = lambda name, what: None
    took_part: dict[str, list[int]] = field(default_factory=dict)
    """The rounds, counted from 1, in which each client's result was used."""
    joined: dict[str, Values] = field(default_factory=dict)
    """The values that each site reported when it joined."""
    best: tuple[Standing, int | None] = UNMEASURED, None
    """Standing and number of the best committed round: sites keep their private parts of it."""
    _offset: OffsetOfSites = field(default_factory=OffsetOfSites)
    _round: int = 0
    _done: int = 0  # the last round committed
    _private_parts: bool = False
    _releases: dict[str, int] = field(default_factory=dict)
    _missed: set[str] = field(default_factory=set)  # clients that were lost from a round
    _busy: set[str] = field(default_factory=set)  # stragglers, which may be training still
    _strangers: set[str] = field(default_factory=set)  # sites without a place in the run that were named in the log

    @property
    def engine(self) -> RemoteClients:
        return self

    @property
    def wire(self) -> Wire:
        return self.policy.wire

    @property
    def has_whole_adapters(self) -> bool:
        return not self._private_parts

    @property
    def sends_descriptions(self) -> bool:
        """False: the server's operator has the descriptions already."""
        return False

    def train(self, work: Work, round: int, lr: float) -> Trained:
        self._round = round
        jobs = {self.run.names[k]: mine for k, mine in jobs_of(work).items()}
        replies = self._ask("train", {name: self._training(name, work, mine, lr) for name, mine in jobs.items()})
        last = round + 1 >= self.policy.rounds  # after it, nothing is faster without the stragglers
        self._busy = set() if last else stragglers(replies)
        rows, answers, failed = training_results(replies, jobs, work, self.policy, self.run)
        failed += (wrong := astray(work, rows, sorted(answers), self.policy.max_norm))
        gone = {failure.client for failure in wrong}
        done = sorted(j for j in answers if int(work.client[j]) not in gone)
        for k in sorted(set(work.client[done].tolist())):
            self.took_part.setdefault(self.run.names[k], []).append(round + 1)
        return Trained(
            client=work.client[done], job=torch.tensor(done, dtype=torch.int64), rows=rows[done], lr=lr,
            failed=tuple(failed), **{key: column(answers, done, key) for key in ("examples", "tokens", "steps", "loss")},
        )  # fmt: skip

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        """Stragglers are not asked: the round would wait for them."""
        mine: dict[str, list[int]] = {}
        for i, k in enumerate(client.tolist()):
            mine.setdefault(self.run.names[k], []).append(i)
        replies = self._ask("evaluate", {
            name: evaluation_request(rows[places], splits, {"limit": limit, **self._kept(name)})
            for name, places in mine.items() if name not in self._busy
        })  # fmt: skip
        return scores_of("evaluate", replies, mine, (len(client), len(splits)))

    def losses(self, offer: Offer, limit: int | None) -> Tensor:
        """Stragglers are not asked, as for ``evaluate``."""
        mine = {self.run.names[k]: [i] for i, k in enumerate(offer.client.tolist())}
        replies = self._ask("choose", {
            name: choice_request(offer, i, self.policy.wire, {"limit": limit, **self._kept(name)})
            for name, [i] in mine.items() if name not in self._busy
        })  # fmt: skip
        return scores_of("choose", replies, mine, (len(offer.client), len(offer))).loss

    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        raise UserError("generated text stays at the sites; only its scores come back")

    def grade(self, rows: Tensor, client: Tensor, limit: int | None, max_new_tokens: int, round: int) -> list[Grade]:
        names = [self.run.names[k] for k in client.tolist()]
        asked = {"limit": limit, "max_new_tokens": max_new_tokens}
        replies = self._ask("grade", {
            name: Request(asked | self._kept(name, round), {row_key(0): row})
            for name, row in zip(names, rows, strict=True)
        })  # fmt: skip
        return [grade_of(replies[name]) for name in names]

    def rebase(self, offset: Tensor | None) -> None:
        self._offset.change(offset)

    def allow_transfer(self) -> Tensor:
        """No client where rows have private parts: the server has no whole row to try elsewhere."""
        allowed = [
            k for k, name in enumerate(self.run.names) if self.joined.get(name, {}).get("allow_transfer") is True
        ]
        return torch.tensor([] if self._private_parts else allowed, dtype=torch.int64)

    def needs_warm_start(self) -> Tensor:
        late = self._missed | self.run.expected
        names = enumerate(self.run.names)
        return torch.tensor([k for k, n in names if n in late and not self.took_part.get(n)], dtype=torch.int64)

    def round_extras(self) -> Values:
        policy, asked, came = self.policy, self.policy.privacy, sorted(self.run.expected & self.run.examples.keys())
        joined = {"joined": {name: self.run.examples[name] for name in came}} if came else {}
        if asked is None:
            return joined
        return joined | {"privacy": {
            name: spent(asked, policy.training, self.run.examples[name], policy.times, n, policy.measurements)
            for name, n in sorted(self._releases.items()) if name in self.run.examples
        }}  # fmt: skip

    def begin(self, has_private_parts: bool) -> None:
        self._private_parts = has_private_parts

    def committed(self, record: Mapping[str, Any]) -> None:
        """Note the clients that the round counted: in the next rounds they go on from it."""
        self.run = replace(self.run, examples={**self.run.examples, **record.get("joined", {})})
        for name, told in record.get("privacy", {}).items():  # of a site that is away as well
            self._releases[name] = max(told.get("releases", 0), told.get("steps", 0), self._releases.get(name, 0))
        self._done = record["round"]
        self._missed |= set(record.get("cohort", ())) - set(record.get("train_loss", ()))
        for name in record.get("cohort", ()):
            rounds = [r for r in self.took_part.get(name, []) if r < record["round"]]
            self.took_part[name] = [*rounds, record["round"]] if name in record["train_loss"] else rounds
        if (found := standing(record)) < self.best[0]:
            self.best = found, record["round"]

    def finish(self, deployed: Callable[[Tensor], Tensor]) -> None:
        names = self.run.names
        rows = deployed(torch.arange(len(names)))
        self._ask("finish", {
            name: Request({"round": self._done, **self._kept(name)}, {row_key(0): row})
            for name, row in zip(names, rows, strict=True)
        })  # fmt: skip

    def join(self, names: Sequence[str]) -> dict[str, Values | NoReply]:
        """Open the run at these sites. Returns the values that each reports, or the reason why it does not take part."""
        replies = self._exchange("open", {}, names, len(names))
        return {name: self._welcome(name, reply) for name, reply in replies.items()}

    def _welcome(self, name: str, reply: Packet | NoReply) -> Values | NoReply:
        """Note a site's answer to the opening of the run, if it may take part."""
        if isinstance(reply, NoReply):
            return reply
        said, now = reply.values, reply.values.get("examples")
        if (difference := other_protocol(said.get("protocol"))) is not None:
            return NoReply(difference)
        if not is_count(now):
            return NoReply("it reports no number of training examples")
        if now != (was := self.run.examples.get(name, now)):
            return NoReply(f"its data changed: it trained on {was} examples when it joined; restore it")
        self.joined[name] = said
        self.run = replace(self.run, examples={**self.run.examples, name: now})
        return said

    def _kept(self, name: str, as_of: int | None = None) -> Values:
        """The state that a site should go on from: that of its last round, up to ``as_of``, that counted."""
        rounds = [r for r in self.took_part.get(name, []) if as_of is None or r <= as_of]
        return {"since": max(rounds, default=0), "private_parts": self._private_parts}

    def _training(self, name: str, work: Work, mine: Sequence[int], lr: float) -> Request:
        keep = [] if self.best[1] is None else [self._kept(name, self.best[1])["since"]]
        return training_request(work, mine, self.policy.wire, {"lr": lr, "keep": keep, **self._kept(name)})

    def _ask(self, kind: RequestKind, requests: Mapping[str, Request]) -> dict[str, Packet | NoReply]:
        """The reply of each site to its request of one ``kind``. Newcomers among the sites are asked to join meanwhile; they
        take part from the next exchange on."""
        online = self._somebody_online()
        self._warn_of_strangers(online)
        newcomers = [name for name in requests if name in online and name not in self.joined]
        welcomed: dict[str, Values | NoReply] = {}
        if kind == "finish" or not requests.keys() & online & self.joined.keys():
            # No exchange follows, or nobody else waits: they join before the requests are sent.
            welcomed, newcomers = self.join(newcomers) if newcomers else {}, []
        here = {name: request for name, request in requests.items() if name in online and name in self.joined}
        replies = self._exchange(kind, here, newcomers, self._minimum(kind, len(here)))
        welcomed |= {name: self._welcome(name, replies.pop(name)) for name in newcomers}
        for name in requests.keys() - replies.keys():
            replies[name] = unasked(welcomed.get(name))
        for name, reply in replies.items():
            if isinstance(reply, NoReply) and kind != "train":
                log.warning("%s from %s: %s", kind, name, reply.reason)
        return replies

    def _somebody_online(self) -> set[str]:
        """The sites online, waiting for the first of the run up to the deadline of a round. Where none is online the network or
        a gate is away, and rounds would only pass."""
        until = time.monotonic() + self.policy.deadline
        while not (online := self.transport.roster()) & set(self.run.names) and time.monotonic() < until:
            time.sleep(_PAUSE)
        return online

    def _warn_of_strangers(self, online: set[str]) -> None:
        for name in sorted(online - self._strangers - set(self.run.names)):
            log.warning("%s has no place in this run; it may take part in the next (data.expected keeps places)", name)
            self._strangers.add(name)

    def _minimum(self, kind: RequestKind, asked: int) -> int:
        """The number of replies that end an exchange with ``asked`` sites: fewer than all in training only."""
        return asked if kind != "train" or self.policy.minimum is None else min(self.policy.minimum, asked)

    def _exchange(
        self, kind: RequestKind, requests: Mapping[str, Request], newcomers: Sequence[str], minimum: int
    ) -> dict[str, Packet | NoReply]:
        """The replies of sites to their requests, of which ``minimum`` are enough, and of newcomers, which are asked to join."""
        asked = {name: addressed(self._head("open", name), Request(self.run.opening_of(name))) for name in newcomers}
        based = {name: self._offset.added_to(request, name) for name, request in requests.items()}
        asked |= {name: addressed(self._head(kind, name), request) for name, request in based.items()}
        if not asked:
            return {}
        expected = {name: expectation for name, (_, expectation) in asked.items()}

        def counts(name: str, reply: Reply) -> bool:
            """True for a reply that is one of the ``minimum``: a valid one, and not a newcomer's beside other sites."""
            if name not in asked:
                return False
            if isinstance(reply, bytes) and minimum < len(asked):
                reply = found if isinstance(found := read_reply(reply, expected[name]), NoReply) else reply
            what = expected[name].head.kind
            self.watch(name, f"{what}: {reply.reason if isinstance(reply, NoReply) else 'answered'}")
            return isinstance(reply, bytes) and (name in requests or not requests)

        packed = {name: pack(packet) for name, (packet, _) in asked.items()}
        most = {name: expectation.most_bytes for name, expectation in expected.items()}
        replies = self.transport.exchange(packed, self.policy.deadline, minimum, counts, most)
        for name in replies.keys() - asked.keys():
            log.warning("a reply from %s: rejected, it was asked nothing", name)
        found = {name: read_reply(replies.get(name), expected[name]) for name in asked}
        for name, reply in found.items():
            if isinstance(reply, Packet):
                self._note_releases(name, reply)
        for name in requests:
            self._offset.note(name, isinstance(found[name], Packet))
        return found

    def _head(self, kind: RequestKind, name: str) -> Head:
        return Head(kind, self.run.number, self.run.segment, self._round, name)

    def _note_releases(self, name: str, reply: Packet) -> None:
        """Note the number of releases, or private steps, that a site reports; it is never less than it was before."""
        told = reply.values.get("releases")
        self._releases[name] = max(told if is_count(told) else 0, self._releases.get(name, 0))
