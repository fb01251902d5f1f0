"""The session of a server: base model and adapters are here, the clients at their sites."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mira.config import Experiment
from mira.config.privacy import PrivacySection
from mira.config.sections import SECTIONS
from mira.core.errors import UserError
from mira.data.sources.sites import Sites
from mira.fleet.messages.packet import PROTOCOL
from mira.fleet.messages.policy import RemoteRun, RoundPolicy
from mira.fleet.messages.transport import NoReply, Transport
from mira.fleet.server.clients import RemoteClients
from mira.fleet.site.fingerprints import fingerprints
from mira.fleet.site.privacy import epsilon
from mira.runner.checking import check_for_sites
from mira.setup.build import open_session
from mira.setup.environment import clients_told
from mira.setup.noised import measurements_of
from mira.setup.privacy import times_of
from mira.setup.session import Session
from mira.store import Store

log = logging.getLogger(__name__)
T = TypeVar("T")

# A site needs none of these sections, a plugged-in method or graph least of all; and groups name other sites.
_NOT_SENT = ("data", "graph", "method", "evaluation", "name", "clients", "tracking")
_REFUSED = 60.0  # seconds until a site that did not take part is asked again: the cause may be gone by then
_PAUSE = 2.0  # seconds between two looks at the sites online


@dataclass(frozen=True)
class Opener:
    """The ``open_session`` of a run over machines: builds the server's session and waits until every site has joined once, the
    sites in ``data.expected`` excepted. A resumed run has the sites that it began with.

    ``names``: the sites admitted now. ``patience``: the longest wait for them, in seconds.
    """

    transport: Transport
    names: Callable[[], Collection[str]]
    patience: float
    say: Callable[[str], None] = lambda line: None

    def __call__(
        self,
        experiment: Experiment,
        recorded: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] = lambda tokens: None,
        folder: Path | None = None,
    ) -> Session:
        _check(experiment)
        wire = experiment.server.wire_for(experiment.method)
        experiment = experiment.model_copy(update={"server": replace(experiment.server, wire=wire)})
        data = experiment.data if isinstance(experiment.data, Sites) else Sites()
        begin = sorted(data.examples or set(self.names()) - set(data.expected))
        if not begin:
            raise UserError("data.expected: names every site; a run begins with at least one, leave one out")
        known = data.examples or dict.fromkeys(begin, 1)  # 1 example each until they have joined
        session = open_session(
            experiment.model_copy(update={"data": replace(data, examples=known)}), recorded, folder=folder
        )
        experiment = experiment.model_copy(update={"prompt": session.experiment.prompt})  # with the day it is dated
        number = secrets.token_hex(8) if folder is None else _number(folder)
        remote = self._clients(session, experiment, data, number)
        if data.examples:  # a resumed run waits for its sites, but not for ever
            self._gather(remote, lambda: self._admitted(begin), min(self.patience, remote.policy.deadline))
        else:
            if missing := self._gather(remote, lambda: self._staying(remote, begin), self.patience):
                raise UserError(
                    f"server: {', '.join(missing)} did not join within {self.patience:g} s; start them, or revoke them"
                )
            counts = {name: remote.run.examples[name] for name in begin if name in remote.run.names}
            session = _with_clients(session, _settled(experiment, data, counts, set(begin) - counts.keys()))
        session.surroundings["run"] = number
        return replace(session, remote=remote)

    def _clients(self, session: Session, experiment: Experiment, data: Sites, number: str) -> RemoteClients:
        """The sites of the run ``number``, none of which has joined yet."""
        section = experiment.server
        policy = RoundPolicy(
            experiment.rounds,
            deadline=section.deadline,
            minimum=section.minimum,
            max_norm=section.max_norm,
            wire=section.wire_for(experiment.method),
            privacy=experiment.privacy,
            training=experiment.training,
            times=times_of(experiment),
            measurements=measurements_of(experiment),
        )
        run = RemoteRun(
            number, secrets.token_hex(8), session.names, _opening(session, experiment), experiment.clients.rank,
            data.examples, frozenset(data.expected),
        )  # fmt: skip
        return RemoteClients(
            run, self.transport, policy, session.layout.size, lambda name, what: self.say(f"{name}: {what}")
        )

    def _admitted(self, names: Sequence[str]) -> list[str]:
        now = self.names()
        return [name for name in names if name in now]

    def _staying(self, remote: RemoteClients, begin: Sequence[str]) -> list[str]:
        """The sites among ``begin`` that are still admitted. Sites revoked meanwhile become no clients of the run; those that
        had joined already then join again, under their new numbers. Raises UserError where no site is left."""
        names, admitted = remote.run.names, self._admitted(begin)
        if gone := [name for name in begin if name in names and name not in admitted]:
            self.say(f"without {', '.join(gone)}: revoked before the run began")
            remote.run = replace(remote.run, names=[name for name in names if name not in gone], examples={})
            remote.joined.clear()
        staying = [name for name in begin if name in remote.run.names]
        if not staying:
            raise UserError("server: all sites were revoked before the run began; 'mira kit admit' admits one")
        return staying

    def _gather(self, remote: RemoteClients, names: Callable[[], Sequence[str]], patience: float) -> list[str]:
        """Wait until all ``names`` have joined, at most ``patience`` seconds. Returns those that have not."""
        until, told = time.monotonic() + patience, list[str]()
        again: dict[str, float] = {}  # when to ask the sites that refused once more
        while missing := [name for name in names() if name not in remote.joined]:
            online, now = self.transport.roster(), time.monotonic()
            asked = [name for name in missing if name in online and again.get(name, now) <= now]
            for name, said in remote.join(asked).items():
                if isinstance(said, NoReply):
                    log.warning("%s does not take part: %s", name, said.reason)
                    again[name] = now + _REFUSED
                else:
                    self.say(f"{name} has joined, {_with_examples(remote.policy.privacy, said['examples'])}")
            absent = [name for name in missing if name not in remote.joined]
            if absent and absent != told:
                self.say(f"waiting for {', '.join(absent)}")
            if absent and time.monotonic() > until:
                return absent
            told = absent
            time.sleep(_PAUSE if absent else 0)
        return []


def _with_examples(asked: PrivacySection | None, count: int) -> str:
    """The number of training examples of a site that has joined, for people."""
    if asked is not None and not asked.tells:
        return "and tells no number of training examples"
    return f"with {count} training example{'' if count == 1 else 's'}"


def _settled(experiment: Experiment, data: Sites, counts: dict[str, int], gone: Set[str]) -> Experiment:
    """``experiment`` with the ``counts`` of its sites' examples, and without its entries for the sites that are ``gone``."""

    def rest(said: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in said.items() if name not in gone}

    data = replace(data, examples=counts, groups=rest(data.groups), descriptions=rest(data.descriptions))
    clients = replace(experiment.clients, rank=rest(experiment.clients.rank))
    return experiment.model_copy(update={"data": data, "clients": clients})


def _check(experiment: Experiment) -> None:
    """Raises UserError for settings that sites cannot follow, or without the accountant that they need."""
    check_for_sites(experiment)
    if experiment.privacy is not None:
        epsilon(experiment.privacy.noise or 1.0, experiment.privacy.delta, 1)  # a missing accountant is found now


def _opening(session: Session, experiment: Experiment) -> dict[str, Any]:
    """The values of the "open" request that are the same for every site."""
    adapters = SECTIONS["adapter"]
    plugin = adapters.plugin(getattr(experiment.adapter, adapters.tag))
    given = experiment.model_dump(mode="json")
    return {
        "protocol": PROTOCOL,
        "experiment": {key: value for key, value in given.items() if key not in _NOT_SENT},
        "adapter_package": f"{plugin.package} {plugin.version}" if plugin is not None and plugin.package else None,
        "about": {"run": experiment.name, "method": experiment.method.name},  # for the cards of adapters
        "threads": session.surroundings["threads"],
        "trainings": times_of(experiment),
        "measurements": measurements_of(experiment),
        **fingerprints(session),
    }


def _with_clients(session: Session, experiment: Experiment) -> Session:
    """The session with the clients of ``experiment``, on the base model that is loaded."""
    from mira.data.federation import make_federation

    federation = make_federation(experiment.data, experiment.split, experiment.seed)
    corpus = replace(session.corpus, federation=federation)
    surroundings = session.surroundings | clients_told(federation)
    return replace(session, experiment=experiment, federation=federation, corpus=corpus, surroundings=surroundings)


def _number(folder: Path) -> str:
    """The number of the run in ``folder``. Raises UserError where it was not run over machines."""
    with Store.open(folder, writable=False) as store:
        number = store.environment().get("run")
    if not isinstance(number, str):
        raise UserError(f"{folder}: was not run over machines; go on with: mira run {folder} --resume")
    return number
