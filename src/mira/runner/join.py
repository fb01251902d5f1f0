"""A new client of a finished run: it starts from the mean of its neighbours' adapters and trains alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mira import config
from mira.config import Experiment
from mira.config.experiment import ClientsSection
from mira.config.overrides import override
from mira.config.sections import SECTIONS
from mira.core.errors import UserError, did_you_mean
from mira.core.offset import OFFSET, offset_of
from mira.core.similarity import cosines
from mira.core.types import MemoryRows, ServerState, Work
from mira.data.federation import SplitClient, make_federation
from mira.data.reading import existing, read_records
from mira.data.records import Tally
from mira.data.types import Client, client_data
from mira.engine.embed import embed
from mira.runner.measuring import without_nan
from mira.runner.recording import state_of
from mira.serving.folders import export_adapters
from mira.setup.build import open_session
from mira.setup.environment import check_environment, clients_of, taken_over
from mira.setup.session import Session
from mira.store import Store

log = logging.getLogger(__name__)

Joined = dict[str, Any]
# Sections and keys that may differ from the run's. With another adapter or model the rows would be meaningless.
_ITS_OWN = ("split", "prompt", "training", "evaluation", "engine", "model.name", "model.source", "model.device")
ADAPTED = "adapted"  # in the run folder: a PEFT folder and NAME.json for each client that joined


@dataclass(frozen=True)
class _Newcomer:
    """Data source of one client, from its files."""

    name: str
    group: str
    files: tuple[Path, ...]

    def load(self, seed: int) -> list[Client]:
        tally = Tally()
        examples = [e for file in self.files for e in tally.examples(read_records(existing(file, "--data")))]
        tally.tell()
        return [client_data(self.name, examples, self.group)]


def adapt(
    folder: Path, name: str, files: Sequence[Path], group: str | None, neighbours: int, rounds: int,
    overrides: Sequence[str] = (),
) -> Joined:  # fmt: skip
    """Train an adapter for the new client ``name`` and write it to ``folder``/adapted. The run itself is not changed.

    Training starts from Σ_l a_l·θ_l / Σ_l a_l over the neighbours l in the run. With ``group``: the clients of the group, a_l =
    1. Without: the ``neighbours`` clients with the most similar task descriptions, a_l their centred cosine. If neither
    descriptions nor groups distinguish the clients: all clients, a_l = 1. Then ``rounds`` rounds of local training follow at the
    run's peak learning rate, and for comparison the same from the common start. Raises UserError.
    """
    with Store.open(folder, writable=False) as store:
        experiment, environment = (
            config.recorded(store.config(), store.environment(), store.folder),
            store.environment(),
        )
        known = _known(environment, experiment, by_group=group is not None)
        _check(name, group, known)
        own = _own(experiment, _Newcomer(name, group or "", tuple(files)), overrides)
        alike = (own.engine, own.model.device) == (experiment.engine, experiment.model.device)
        session = open_session(own, taken_over(environment) if alike else {})
        check_environment(environment, session.environment | {"data": environment["data"]}, must=("model",))
        related, weight = _of_group(group, known) if group is not None else _of_description(session, known, neighbours)
        method = session.method_of(experiment, [client.name for client in known])
        state = state_of(session, store)
        warm = session.layout.mean(method.deployed(state, related), weight)
        session.rebase(offset_of(state))
    rows = torch.stack([warm, store.start])
    curve, rows = _train(session, rows, state.round, rounds)
    told = [{"round": n, "clients": {name: point["warm"]}} for n, point in ((0, curve[0]), (rounds, curve[-1]))]
    place = export_adapters(session, folder / ADAPTED, _alone(session, rows[0], rounds, state), [0], told)[0]
    chosen = [{"name": known[k].name, "weight": w} for k, w in zip(related.tolist(), weight.tolist(), strict=True)]
    found = {"client": name, "neighbours": chosen, "rounds": curve}
    kept = found | {"adapter": place.name}  # relative, so that the folder can be moved
    place.with_suffix(".json").write_text(json.dumps(kept, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return {"run": str(folder.resolve())} | found | {"adapter": str(place.resolve())}


def lines(result: Joined) -> Iterator[str]:
    """The result for people: the neighbours, the test loss beside that from the common start, and the adapter's folder."""
    yield "starts from " + ", ".join(f"{one['name']} ({one['weight']:.2f})" for one in result["neighbours"])
    yield "steps    test loss    from the common start"
    for point in result["rounds"]:
        yield f"{point['steps']:5}    {_number(point['warm'])}    {_number(point['common'])}"
    yield f"adapter {result['adapter']}"


def _number(scores: Joined) -> str:
    return "  not finite" if scores["test_loss"] is None else f"{scores['test_loss']:9.3f}"


def _own(experiment: Experiment, source: _Newcomer, overrides: Sequence[str]) -> Experiment:
    """The run's experiment with the new client as its only client."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key not in _ITS_OWN and key.partition(".")[0] not in _ITS_OWN:
            raise UserError(
                f"--set {text}: a new client has the {key.partition('.')[0]} of the run; it may set"
                f" {', '.join(_ITS_OWN)}"
            )
    changed = config.parse(override(experiment.model_dump(mode="json"), overrides))
    training = replace(changed.training, keep_optimizer=False)
    return changed.model_copy(
        update={
            "data": source,
            "method": SECTIONS["method"]["local"](),
            "graph": SECTIONS["graph"]["complete"](),
            "training": training,
            "clients": ClientsSection(),
        }
    )


def _known(environment: dict[str, Any], experiment: Experiment, by_group: bool) -> tuple[SplitClient, ...]:
    """The run's clients. Their data is read only if clients without a description must be compared."""
    recorded = clients_of(environment, experiment.seed)
    if recorded is not None and (by_group or all(client.description for client in recorded.clients)):
        return recorded.clients
    path = getattr(experiment.data, "path", None)
    if isinstance(path, Path) and not path.exists():
        raise UserError(
            f"--client: the run's clients have no descriptions and are compared by their data, which is no longer at {path};"
            " put it back, or give a group with --group"
        )
    return make_federation(experiment.data, experiment.split, experiment.seed).clients


def _check(name: str, group: str | None, known: Sequence[SplitClient]) -> None:
    if name in (client.name for client in known):
        raise UserError(f"--client {name}: is a client of this run; give the new client another name")
    groups = {client.group for client in known if client.group}
    if group is not None and group not in groups:
        hint = did_you_mean(group, groups) if groups else "; its clients have no group, leave --group out"
        raise UserError(f"--group {group}: no client of the run is in this group{hint}")


def _of_group(group: str, known: Sequence[SplitClient]) -> tuple[Tensor, Tensor]:
    related = torch.tensor([k for k, client in enumerate(known) if client.group == group])
    return related, torch.ones(len(related), dtype=torch.float64)


def _of_description(session: Session, known: Sequence[SplitClient], most: int) -> tuple[Tensor, Tensor]:
    told = [session.federation.clients[0].about, *(client.about for client in known)]
    if len(set(told)) == 1:
        log.info("all clients of the run have the same task description; using equal weights")
        return _everyone(known)
    weight, related = cosines(embed(session.base.model, session.base.tokenizer, told))[0, 1:].sort(
        descending=True, stable=True
    )
    alike = weight[:most] > 0
    if bool(alike.any()):
        return related[:most][alike], weight[:most][alike]
    groups = sorted({client.group for client in known if client.group})
    if groups:
        raise UserError(
            f"--client: no task description of the run is similar to this client's; give its group with --group"
            f" ({', '.join(groups)})"
        )
    log.warning(
        "no task description of the run is similar to this client's, and its clients have no groups; using equal weights"
    )
    return _everyone(known)


def _everyone(known: Sequence[SplitClient]) -> tuple[Tensor, Tensor]:
    return torch.arange(len(known)), torch.ones(len(known), dtype=torch.float64)


def _train(session: Session, rows: Tensor, round: int, rounds: int) -> tuple[list[Joined], Tensor]:
    """Losses of the two ``rows`` before training and after each round, and the trained rows."""
    training, both = session.experiment.training, torch.zeros(2, dtype=torch.int64)
    curve = [_losses(session, rows, 0)]
    for n in range(rounds):
        trained = session.engine.train(Work(both, rows), round + n, training.lr)
        if trained.failed:
            raise UserError(f"--client: {trained.failed[0].reason}")
        rows = trained.rows[trained.job.argsort()]
        curve.append(_losses(session, rows, curve[-1]["steps"] + int(trained.steps[0])))
    return curve, rows


def _losses(session: Session, rows: Tensor, steps: int) -> Joined:
    loss = session.engine.evaluate(rows, torch.zeros(2, dtype=torch.int64), ("validation", "test")).loss.tolist()
    named = [{"validation_loss": validation, "test_loss": test} for validation, test in loss]
    clean: Joined = without_nan({"steps": steps, "warm": named[0], "common": named[1]})
    return clean


def _alone(session: Session, row: Tensor, round: int, run: ServerState) -> ServerState:
    """The state of one client with ``row`` [P] on the base of ``run``."""
    offset = offset_of(run)
    extra = {} if offset is None else {OFFSET: offset}
    return ServerState(MemoryRows(row, 1, {}), session.initial_state().graph, extra, round)
