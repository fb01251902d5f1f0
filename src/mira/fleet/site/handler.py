"""The requests of a site: it trains, measures, keeps its private parts, and answers in numbers alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mira import config
from mira.config.privacy import Metrics
from mira.core.errors import UserError
from mira.core.loop import screen
from mira.core.offers import option_scores
from mira.core.types import Trained, Work
from mira.core.wire import Wire, compress, down, encode
from mira.data.sources.sites import Own
from mira.data.types import Source
from mira.fleet.messages.packet import PROTOCOL, Packet, other_protocol, pack, row_key, unpack
from mira.fleet.site import refusals, training
from mira.fleet.site.account import MEASURED, check_terms, describe, evaluator, note_terms, private, terms_of
from mira.fleet.site.fingerprints import fingerprints
from mira.fleet.site.offset import rebase
from mira.fleet.site.origin import note_losses, origin_of
from mira.fleet.site.privacy import release
from mira.fleet.site.refusals import RefusedRequest
from mira.fleet.site.state import SiteState
from mira.runner import evaluation
from mira.serving.folders import export_row
from mira.setup.build import open_session
from mira.setup.privacy import untold
from mira.setup.session import Session

log = logging.getLogger(__name__)

Values = dict[str, Any]
Answer = tuple[Values, dict[str, Tensor]]
# In the place of an error, which may hold text or file names.
SEE_LOG = "it failed; the reason is in the site's own log"
_NOT_TOLD = "privacy.metrics: losses and metrics as they are stay at this site"


@dataclass(frozen=True)
class JoinedRun:
    """A run that this site takes part in. ``number``: the client's; ``start``: the common start row [P], within its rank;
    ``terms``: the values that price its private steps."""

    session: Session
    state: SiteState
    number: int
    start: Tensor
    terms: Values

    @property
    def wire(self) -> Wire:
        """The format of the rows that this site sends. A server names it; one of before that was its default."""
        return self.session.experiment.server.wire or "fp32"

    @property
    def metrics(self) -> str:
        """privacy.metrics: what the site tells beside its rows."""
        asked = self.session.experiment.privacy
        return "exact" if asked is None else asked.metrics

    def kept_parts(self, values: Values) -> dict[str, Tensor]:
        """The private parts kept of the round that a request of ``values`` goes on from."""
        return self.state.get(int(values["since"])) if values["private_parts"] else {}

    @property
    def releases(self) -> int:
        """Number of rows with noise that left this site in this run; with privacy.unit=example, of steps with noise."""
        return int((self.state.noted("releases") or {"count": 0})["count"])

    def charge(self, work: Work) -> None:
        """Count the private steps of ``work`` before they are done. Raises RefusedRequest where its budget has no room."""
        accountant = self.session.accountant
        if accountant is not None:
            if len(accountant.charge(work)) < len(work.client):
                raise RefusedRequest(accountant.refusal)
            note_terms(self.state, self.terms)
            self.state.note("releases", {"count": accountant.steps[self.number]})


@dataclass
class SiteHandler:
    """One client of a federation, next to its data.

    ``state``: the folder of all that the site keeps. ``model``: the base model's name or folder here, None as the server calls
    it. ``allow_transfer``: other sites' adapters may be tried on its data. ``min_noise``: the least ``privacy.noise`` of a run
    that it takes part in. ``max_epsilon``: the largest ε of each example in such a run; None: it need not protect examples;
    ``max_delta``: the largest δ at which it counts; None: 0.01 over the number of the site's training examples.
    ``privacy_metrics``: the most that such a run may ask it to tell.
    """

    name: str
    source: Source
    state: Path
    model: str | None = None
    allow_transfer: bool = False
    threads: int | None = None
    min_noise: float = 0.0
    max_epsilon: float | None = None
    privacy_metrics: Metrics = "exact"
    max_delta: float | None = None
    _joined: dict[str, JoinedRun] = field(default_factory=dict)

    def handle(self, request: bytes) -> bytes:
        """The reply to ``request``. A failure is answered too; its full reason stays in the log."""
        packet = unpack(request)
        act: Callable[[Packet], Answer] = {
            "open": self._open, "train": self._train, "choose": self._choose, "evaluate": self._evaluate,
            "grade": self._grade, "finish": self._finish,
        }[packet.head.kind]  # fmt: skip
        try:
            if packet.head.name != self.name:
                raise RefusedRequest("the message is meant for another site")
            values, tensors = act(packet)
        except RefusedRequest as refusal:
            kind, number = packet.head.kind, packet.head.round + 1
            known = {"round": number} if kind in ("train", "choose") else {}
            log.warning("%s: %s", f"round {number}" if kind == "train" else kind, refusal, extra=known)
            values, tensors = {"failed": str(refusal)}, {}
        except UserError as error:
            log.error("%s", error)
            values, tensors = {"failed": SEE_LOG}, {}
        return pack(Packet(packet.head, values, tensors))

    def _open(self, packet: Packet) -> Answer:
        here = self._run(packet.head.run, packet.values)
        here.state.note("open", packet.values)
        log.info("joined run %s", packet.head.run)
        return {
            "protocol": PROTOCOL, "examples": here.session.federation.clients[0].num_train if here.metrics != "none" else 1,
            "releases": here.releases, "allow_transfer": self.allow_transfer,
        }, {}  # fmt: skip

    def _run(self, run: str, values: Values | None = None) -> JoinedRun:
        """The run called ``run``: its session is built when the server opens it, and again in a new process of this site."""
        state = SiteState.of(self.state, run)
        values = values or state.noted("open")
        if values is None:
            raise RefusedRequest("it has not joined this run")
        key = json.dumps(values, sort_keys=True)
        if key not in self._joined:
            self._joined.clear()  # one base model at a time
            self._joined[key] = self._join(state, values)
        return self._joined[key]

    def _based(self, packet: Packet) -> tuple[JoinedRun, Tensor | None]:
        """The run of ``packet``, its base with the packet's offset, and that offset [n,P]."""
        here = self._run(packet.head.run)
        return here, rebase(here.session, here.state, packet, here.start)

    def _measuring(self, packet: Packet) -> tuple[JoinedRun, Tensor | None]:
        """As ``_based``, for a request of numbers that depend on the data. Raises RefusedRequest where the run tells none."""
        here = self._run(packet.head.run)
        if here.metrics != "exact" and (packet.head.kind != "evaluate" or here.metrics == "none"):
            raise RefusedRequest(_NOT_TOLD)
        return self._based(packet)

    def _join(self, state: SiteState, values: Values) -> JoinedRun:
        if (difference := other_protocol(values.get("protocol"))) is not None:
            raise RefusedRequest(difference)
        given = dict(values["experiment"])
        refusals.check_sources(given)
        refusals.check_adapter(given["adapter"], values.get("adapter_package"))
        if self.model is not None:
            given["model"] = given["model"] | {"name": self.model, "source": "auto", "revision": None}
        experiment = config.parse(given | {"data": {"source": "builtin"}})
        refusals.check_noise(experiment.privacy, self.min_noise, self.max_epsilon)
        refusals.check_metrics(experiment.privacy, self.privacy_metrics)
        experiment = experiment.model_copy(update={"data": Own(self.source, self.name)})
        number = int(values["number"])
        threads = {"threads": self.threads or values["threads"]}
        session = open_session(experiment, threads, folder=state.folder, first=number)
        terms = terms_of(session, number, values)
        check_terms(terms, state.noted("terms"))
        done, measured = ((state.noted(what) or {"count": 0})["count"] for what in ("releases", MEASURED))
        session = private(session, number, values, done, self.max_epsilon, self.max_delta, measured)
        for what, ours in fingerprints(session).items():
            if values[what] != ours:
                raise RefusedRequest(
                    f"its {what} is not the server's (here {ours[:12]}, there {str(values[what])[:12]})"
                )
        # The engine is built now, so that a model it cannot compute is refused when the site joins.
        log.info("computes with the %s engine", session.environment["engine"])
        session.corpus.keep(state.folder / "tokens")
        start, rank = session.start(), values["rank"]
        return JoinedRun(session, state, number, start if rank is None else start * session.layout.within(rank), terms)

    def _train(self, packet: Packet) -> Answer:
        here, values = self._based(packet)[0], packet.values
        since, number = int(values["since"]), packet.head.round + 1
        kept = here.state.get(since, _needs_state(here, values))
        work = training.work_of(packet, here.number, here.start, kept, down(here.wire))
        here.charge(work)
        trained = screen(here.session.engine.train(work, packet.head.round, float(values["lr"])))
        if trained.failed:
            raise (RefusedRequest if here.metrics == "exact" else UserError)(trained.failed[0].reason)
        here.state.keep({since, *values["keep"]})
        rows, residuals = _uploads(here, work, trained, kept)
        own = training.private_parts(work, trained) if values["private_parts"] else {}
        things = own | training.optimizer_states(trained)
        if things | residuals:
            here.state.put(number, things | residuals)
        log.info("round %d: trained, mean loss %.3f", number, float(trained.loss[-1]), extra={"round": number})
        jobs = training.answers(trained if here.metrics == "exact" else untold(trained, here.metrics != "none"))
        return {"jobs": jobs, "releases": here.releases}, rows

    def _choose(self, packet: Packet) -> Answer:
        here, _ = self._measuring(packet)
        try:
            offer = training.offer_of(packet, here.number, here.start, here.kept_parts(packet.values), down(here.wire))
        except (ValueError, LookupError) as error:
            raise RefusedRequest(f"not an offer: {error}") from None
        refusals.check_offer(here.session.experiment.privacy, offer.split)
        scores = option_scores(here.session.engine, offer, packet.values["limit"])
        return {}, {"nll": scores.nll, "tokens": scores.tokens}

    def _evaluate(self, packet: Packet) -> Answer:
        here, values = self._measuring(packet)[0], packet.values
        refusals.check_splits(here.session.experiment.privacy, values["splits"])
        rows = torch.stack([_deployed(here, packet, n) for n in range(values["rows"])])
        client = torch.full((len(rows),), here.number)
        engine = evaluator(here.session, here.state, here.terms, values["splits"], len(rows))
        scores = engine.evaluate(rows, client, values["splits"], values["limit"])
        note_losses(here.state, values["splits"], scores)
        return {}, {"nll": scores.nll, "tokens": scores.tokens}

    def _grade(self, packet: Packet) -> Answer:
        here, limit, most = self._measuring(packet)[0], packet.values["limit"], packet.values["max_new_tokens"]
        row, client = _deployed(here, packet, 0)[None], torch.tensor([here.number])
        references = [here.session.corpus.references(here.number, "test", limit)]
        metrics = here.session.experiment.evaluation.metrics
        return {"grade": evaluation.grade(here.session.engine, row, client, references, limit, most, metrics)[0]}, {}

    def _finish(self, packet: Packet) -> Answer:
        here, offset = self._based(packet)
        place = self.state / "adapter"
        origin = origin_of(here.session, here.state, packet.values.get("round"), here.number, here.releases)
        export_row(here.session, place, _deployed(here, packet, 0), origin, offset)
        log.info("adapter written to %s", place)
        if (asked := here.session.experiment.privacy) is not None:
            log.info("privacy: %s", describe(asked, here.session.accountant, here.number, here.releases))
        return {}, {}


def _needs_state(here: JoinedRun, values: Values) -> bool:
    """True where the training of a round needs state that the site kept of an earlier one. Rounding residuals are only useful."""
    needed: bool = values["private_parts"] or here.session.experiment.training.keep_optimizer
    return needed


def _uploads(
    here: JoinedRun, work: Work, trained: Trained, kept: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoded rows of all jobs that send theirs, and the new rounding residuals of whole rows [P], to be kept: methods may
    send other numbers in each round."""
    rows, residuals, travels = dict[str, Tensor](), dict[str, Tensor](), training.travelling(work)
    for m, j in enumerate(trained.job.tolist()):
        if training.is_sent(work, j):
            residual = kept.get(key := f"residuals{j}", torch.zeros_like(work.start[j]))
            rows[row_key(j)], left = _encoded(here, trained.rows[m, travels], work.start[j, travels], residual[travels])
            residuals |= {} if left is None else {key: training.with_numbers(residual, travels, left)}
    return rows, residuals


def _encoded(here: JoinedRun, row: Tensor, start: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """The bytes in which a trained row [n] leaves, and the next rounding residual [n], None without rounding.

    In fp32 without noise the row itself leaves. Otherwise its displacement from ``start`` [n] does: clipped, with noise, with the
    last ``residual`` added, and rounded. Raises RefusedRequest where a number is not finite.
    """
    wire, privacy = here.wire, here.session.experiment.privacy
    if privacy is not None and privacy.by_example:
        privacy = None  # the row has its noise
    try:
        if wire == "fp32" and privacy is None:
            return encode(row, wire), None
        moved = row - start
        if privacy is not None:
            here.state.note("releases", {"count": here.releases + 1})  # counted before it leaves, whether used or not
            moved = release(moved, privacy.clip, privacy.given_noise)
        data, left = compress(moved, residual, wire)
    except ValueError as error:
        refused = RefusedRequest if here.metrics == "exact" else UserError
        raise refused(f"its adapter cannot be sent: {error}") from None
    return data, None if wire == "fp32" else left


def _deployed(here: JoinedRun, packet: Packet, n: int) -> Tensor:
    """Row ``n`` of ``packet``, with the private parts of this site put into it."""
    return training.with_private_parts(packet.tensors[row_key(n)], here.kept_parts(packet.values))
