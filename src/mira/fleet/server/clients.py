"""The engine whose clients are on machines of their own: each gets its part of the work, and whoever answers has taken part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any

import torch
from torch import Tensor

from mira.core.best_round import UNMEASURED, Standing, standing
from mira.core.errors import UserError
from mira.core.payload import is_private, jobs_of, parcel
from mira.core.types import Failure, Grade, Scores, Trained, Work
from mira.core.wire import Wire, decode, down, encode, encode_mask, num_bytes
from mira.fleet.messages.policy import RemoteRun, RoundPolicy
from mira.fleet.messages.replies import RejectedReply, column, grade_of, is_count, read_reply, result_of, unlike_scores
from mira.fleet.messages.transport import Head, NoReply, Packet, Reply, RequestKind, Transport, pack
from mira.fleet.messages.validate import Expected, Shapes, distance, too_far
from mira.fleet.site.privacy import epsilon

log = logging.getLogger(__name__)

Values = dict[str, Any]
Request = tuple[Values, dict[str, Tensor], Shapes]  # what is sent, and the tensors that come back
_PAUSE = 2.0  # seconds between two looks at who is online


@dataclass
class RemoteClients:
    """``watch`` is told, name by name, what comes back."""

    run: RemoteRun
    transport: Transport
    policy: RoundPolicy
    size: int  # P
    watch: Callable[[str, str], None] = lambda name, what: None
    took_part: dict[str, list[int]] = field(default_factory=dict)
    """The rounds, counted from 1, in which each client's result was used."""
    joined: dict[str, Values] = field(default_factory=dict)
    best: tuple[Standing, int | None] = UNMEASURED, None
    """The best committed round's standing and number: the sites keep what stays with them of it."""
    _round: int = 0
    _private_parts: bool = False
    _releases: dict[str, int] = field(default_factory=dict)
    _missed: set[str] = field(default_factory=set)  # who was lost from a round
    _busy: set[str] = field(default_factory=set)  # who was not waited for, and may be training still
    _strangers: set[str] = field(default_factory=set)

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
        replies = self._ask("train", {name: self._request(name, work, mine, lr) for name, mine in jobs.items()})
        late = {name for name, reply in replies.items() if isinstance(reply, NoReply) and reply.busy}
        self._busy = (
            late if round + 1 < self.policy.rounds else set()
        )  # after the last round nothing is faster without them
        rows, answers, failed = work.start.clone(), dict[int, Values](), []
        for name, mine in jobs.items():
            try:
                answers |= self._result(replies[name], mine, work, rows)
            except RejectedReply as reason:
                asked = not isinstance(said := replies[name], NoReply) or said.sent
                failed.append(Failure(self.run.names.index(name), str(reason), asked))
        for k, why in self._astray(work, rows, sorted(answers)).items():
            failed.append(Failure(k, why))
            answers = {j: answer for j, answer in answers.items() if int(work.client[j]) != k}
        done = sorted(answers)
        for k in sorted(set(work.client[done].tolist())):
            self.took_part.setdefault(self.run.names[k], []).append(round + 1)
        return Trained(
            client=work.client[done], job=torch.tensor(done, dtype=torch.int64), rows=rows[done], lr=lr,
            failed=tuple(failed), **{key: column(answers, done, key) for key in ("examples", "tokens", "steps", "loss")},
        )  # fmt: skip

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None) -> Scores:
        mine: dict[str, list[int]] = {}
        for i, k in enumerate(client.tolist()):
            mine.setdefault(self.run.names[k], []).append(i)
        replies = self._ask("evaluate", {  # of those who can answer: the round would wait for who is training still
            name: (
                {"rows": [f"row{i}" for i in places], "splits": list(splits), "limit": limit, **self._own(name)},
                {f"row{i}": rows[i] for i in places},
                {key: ((len(places), len(splits)), dtype) for key, dtype in (("nll", torch.float64), ("tokens", torch.int64))},
            ) for name, places in mine.items() if name not in self._busy
        })  # fmt: skip
        nll = torch.full((len(client), len(splits)), nan, dtype=torch.float64)
        tokens = torch.zeros(len(client), len(splits), dtype=torch.int64)
        for name, places in mine.items():
            if isinstance(reply := replies.get(name), NoReply | None):
                continue
            if (wrong := unlike_scores(reply)) is None:
                nll[places], tokens[places] = reply.tensors["nll"], reply.tensors["tokens"]
            else:
                log.warning("evaluate from %s: %s", name, wrong)
        return Scores(nll, tokens)

    def generate(
        self, rows: Tensor, client: Tensor, split: str, limit: int | None, max_new_tokens: int
    ) -> list[list[str]]:
        raise UserError("generated text stays at the sites; only its scores come back")

    def grade(self, rows: Tensor, client: Tensor, limit: int | None, max_new_tokens: int, round: int) -> list[Grade]:
        names = [self.run.names[k] for k in client.tolist()]
        asked = {"limit": limit, "max_new_tokens": max_new_tokens}
        replies = self._ask(
            "grade", {n: (asked | self._own(n, round), {"row": row}, {}) for n, row in zip(names, rows, strict=True)}
        )
        return [grade_of(replies[name]) for name in names]

    def allow_transfer(self) -> Tensor:
        """None where a part of the rows stays with their clients: there is no whole row to try elsewhere."""
        open = [k for k, name in enumerate(self.run.names) if self.joined.get(name, {}).get("allow_transfer") is True]
        return torch.tensor([] if self._private_parts else open, dtype=torch.int64)

    def needs_warm_start(self) -> Tensor:
        late = self._missed | self.run.expected
        names = enumerate(self.run.names)
        return torch.tensor([k for k, n in names if n in late and not self.took_part.get(n)], dtype=torch.int64)

    def round_extras(self) -> Values:
        asked, came = self.policy.privacy, sorted(self.run.expected & self.run.examples.keys())
        joined = {"joined": {name: self.run.examples[name] for name in came}} if came else {}
        if asked is None:
            return joined
        return joined | {"privacy": {
            name: {"releases": n, "epsilon": epsilon(asked.noise, asked.delta, n), "delta": asked.delta}
            for name, n in sorted(self._releases.items())
        }}  # fmt: skip

    def begin(self, has_private_parts: bool) -> None:
        self._private_parts = has_private_parts

    def committed(self, record: Mapping[str, Any]) -> None:
        """From now on the sites go on from this round, if it used what they sent."""
        self.run = replace(self.run, examples={**self.run.examples, **record.get("joined", {})})
        for name, spent in record.get("privacy", {}).items():  # of a site that is away as well
            self._releases[name] = max(spent["releases"], self._releases.get(name, 0))
        self._missed |= set(record.get("cohort", ())) - set(record.get("train_loss", ()))
        for name in record.get("cohort", ()):
            rounds = [r for r in self.took_part.get(name, []) if r < record["round"]]
            self.took_part[name] = [*rounds, record["round"]] if name in record["train_loss"] else rounds
        if (found := standing(record)) < self.best[0]:
            self.best = found, record["round"]

    def finish(self, deployed: Callable[[Tensor], Tensor]) -> None:
        names = self.run.names
        rows = deployed(torch.arange(len(names)))
        self._ask("finish", {n: (self._own(n), {"row": row}, {}) for n, row in zip(names, rows, strict=True)})

    def join(self, names: Sequence[str]) -> dict[str, Values | NoReply]:
        """Open the run at these sites: what each says of itself, or why it does not take part."""
        return {name: self._welcome(name, reply) for name, reply in self._exchange({}, names, len(names)).items()}

    def _welcome(self, name: str, reply: Packet | NoReply) -> Values | NoReply:
        if isinstance(reply, NoReply):
            return reply
        said, now = reply.values, reply.values.get("examples")
        if not is_count(now):
            return NoReply("it says of no number of training examples that it has them")
        if now != (was := self.run.examples.get(name, now)):
            return NoReply(f"its data changed: it trained on {was} examples when it joined; restore it")
        self.joined[name] = said
        self.run = replace(self.run, examples={**self.run.examples, name: now})
        return said

    def _own(self, name: str, as_of: int | None = None) -> Values:
        """Which of the things it keeps a site should use: those of the last round of it that counted, up to ``as_of``."""
        rounds = [r for r in self.took_part.get(name, []) if as_of is None or r <= as_of]
        return {"since": max(rounds, default=0), "private_parts": self._private_parts}

    def _request(self, name: str, work: Work, mine: Sequence[int], lr: float) -> Request:
        """A client's jobs, and the rows they need."""
        sent, wire = parcel(work, mine), down(self.policy.wire)
        tensors = {f"a{n}": encode(_part(row, sent.upload), wire) for n, row in enumerate(sent.rows)}
        jobs = [
            {
                "start": None if start is None else f"a{start}", "private": is_private(work, j),
                "anchor": None if anchor is None else f"a{anchor}",
                "prox": float(work.prox[j]) if anchor is not None and work.prox is not None else 0.0,
            } for j, start, anchor in zip(mine, sent.start, sent.anchor, strict=True)
        ]  # fmt: skip
        masks = {"upload": sent.upload, "trainable": work.trainable}
        tensors |= {key: encode_mask(mask) for key, mask in masks.items() if mask is not None}
        keep = [] if self.best[1] is None else [self._own(name, self.best[1])["since"]]
        size = num_bytes(self.policy.wire, sent.numbers, work.start.dtype)
        back = {f"row{place}": ((size,), torch.uint8) for place, j in enumerate(mine) if not is_private(work, j)}
        return {"jobs": jobs, "lr": lr, "keep": keep, **self._own(name)}, tensors, back

    def _result(self, reply: Packet | NoReply, mine: Sequence[int], work: Work, rows: Tensor) -> dict[int, Values]:
        """What a client did, job by job; its rows are written into ``rows``, as far as they left it."""
        if isinstance(reply, NoReply):
            raise RejectedReply(reply.reason)
        answers = reply.values.get("jobs")
        if not isinstance(answers, list) or len(answers) != len(mine):
            raise RejectedReply("its reply does not hold one result for each job")
        examples = self.run.examples[self.run.names[int(work.client[mine[0]])]]
        steps = self.policy.training.steps_for(examples)
        checked = {j: result_of(answers[place], place, examples, steps) for place, j in enumerate(mine)}
        sent, wire = parcel(work, mine), self.policy.wire
        try:
            numbers = {
                j: decode(reply.tensors[f"row{place}"], wire, sent.numbers, work.start.dtype)
                for place, j in enumerate(mine) if not is_private(work, j)
            }  # fmt: skip
        except ValueError as error:
            raise RejectedReply(str(error)) from None
        where = slice(None) if sent.upload is None else sent.upload
        for j, given in numbers.items():
            rows[j, where] = given if wire == "fp32" and self.policy.privacy is None else work.start[j, where] + given
        return checked

    def _astray(self, work: Work, rows: Tensor, done: Sequence[int]) -> dict[int, str]:
        """Clients one of whose rows went further than a row of this round should, and how far."""
        sent = [j for j in done if not is_private(work, j)]
        norm = torch.tensor([distance(rows[j], work.start[j]) for j in sent], dtype=torch.float64)
        return {int(work.client[sent[i]]): found.reason for i, found in too_far(norm, self.policy.max_norm).items()}

    def _ask(self, kind: RequestKind, requests: dict[str, Request]) -> dict[str, Packet | NoReply]:
        """Ask those who are online. Where nobody of the run is, the network or a gate is away, and rounds would only pass: waits
        for the first to come. The new among them are asked to join, and the others do not wait for that: who answers meanwhile
        takes part from the next exchange on."""
        until = time.monotonic() + self.policy.deadline
        while not (online := self.transport.roster()) & set(self.run.names) and time.monotonic() < until:
            time.sleep(_PAUSE)
        for name in sorted(online - self._strangers - set(self.run.names)):
            log.warning("%s has no place in this run; it may take part in the next (data.expected keeps places)", name)
            self._strangers.add(name)
        new = [name for name in requests if name in online and name not in self.joined]
        said: dict[str, Values | NoReply] = {}
        if new and (
            kind == "finish" or not requests.keys() & online & self.joined.keys()
        ):  # no exchange follows, or nobody waits
            said, new = self.join(new), []
        here = {name: (kind, request) for name, request in requests.items() if name in online and name in self.joined}
        minimum = len(here) if kind != "train" or self.policy.minimum is None else min(self.policy.minimum, len(here))
        replies = self._exchange(here, new, minimum)
        said |= {name: self._welcome(name, replies.pop(name)) for name in new}
        for name in requests.keys() - replies.keys():
            answer = said.get(name, NoReply("it is not online"))
            why = answer.reason if isinstance(answer, NoReply) else "it has just joined"
            replies[name] = NoReply(why, sent=False)
        for name, reply in replies.items():
            if isinstance(reply, NoReply) and kind != "train":
                log.warning("%s from %s: %s", kind, name, reply.reason)
        return replies

    def _exchange(
        self, requests: Mapping[str, tuple[RequestKind, Request]], new: Sequence[str], minimum: int
    ) -> dict[str, Packet | NoReply]:
        """The replies of those with requests, of whom ``minimum`` are enough, and of the ``new``, who are asked to join."""
        asked: dict[str, tuple[RequestKind, Request]] = {n: ("open", (self.run.opening_of(n), {}, {})) for n in new}
        asked |= requests
        if not asked:
            return {}
        heads = {n: Head(kind, self.run.number, self.run.segment, self._round, n) for n, (kind, _) in asked.items()}
        packed = {n: pack(Packet(heads[n], values, tensors)) for n, (_, (values, tensors, _)) in asked.items()}
        expected = {n: Expected(heads[n], shapes) for n, (_, (_, _, shapes)) in asked.items()}

        def seen(name: str, reply: Reply) -> bool:
            """One that is refused on sight is not among those that are enough, nor is one of the new where others are asked."""
            if name not in asked:
                return False
            if isinstance(reply, bytes) and minimum < len(asked):
                reply = found if isinstance(found := read_reply(reply, expected[name]), NoReply) else reply
            self.watch(name, f"{asked[name][0]}: {reply.reason if isinstance(reply, NoReply) else 'done'}")
            return isinstance(reply, bytes) and (name in requests or not requests)

        most = {name: reply.most_bytes for name, reply in expected.items()}
        replies = self.transport.exchange(packed, self.policy.deadline, minimum, seen, most)
        for name in replies.keys() - asked.keys():
            log.warning("a reply from %s: rejected, it was asked nothing", name)
        found = {name: read_reply(replies.get(name), expected[name]) for name in asked}
        for name, reply in found.items():
            if isinstance(reply, Packet):
                self._count(name, reply)
        return found

    def _count(self, name: str, reply: Packet) -> None:
        """What a site says it has released; never less than it said before."""
        told = reply.values.get("releases")
        self._releases[name] = max(told if is_count(told) else 0, self._releases.get(name, 0))


def _part(row: Tensor, upload: Tensor | None) -> Tensor:
    return row if upload is None else row[upload]
