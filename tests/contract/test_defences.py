"""Every method that takes ``server.robust`` with each rule: the laws of all methods hold, and one wrong row moves nobody far."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.method_variants import HALVES, ONE_RANK, VARIANTS, used_by
from helpers.sample_config import settings
from mira import Experiment
from mira.core.errors import UserError
from mira.core.graph import Groups
from mira.core.layout import Layout
from mira.core.loop import apply
from mira.core.offers import Choice, settled, unanswered
from mira.core.robust import COUNTED, RULES, Robust
from mira.core.types import Method, Setting, Trained
from mira.methods import METHODS
from mira.methods.defended import Defended, defended
from mira.methods.heterogeneous_ranks import HeterogeneousRanks
from mira.testing import method_checks, methods

pytestmark = pytest.mark.quick

ABLE = [name for name, method in VARIANTS.items() if hasattr(method, "defences")]
LAYOUT = Layout.of({"layer": (300, 200)}, rank=2, alpha=1.0)
CLIENTS, LIAR = 7, 3
HONEST = torch.tensor([k for k in range(CLIENTS) if k != LIAR])
# Without a defence, too, one far row may move others little: none enters, or none yet; Adam bounds the step; A is still 0.
UNMOVED = {"local", "fedadam", "fedsvd"}
# Of a cluster of two nobody can tell who is wrong, and clusters and learned graphs may leave one neighbour, or none.
FEW = {"ifca", "cfl", "mira-learned"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ABLE)
def test_the_laws_of_all_methods_hold(name: str, rule: Robust) -> None:
    layout = methods.LAYOUT if name not in HALVES else Layout.of({"layer": (3, 2)}, rank=2, alpha=1.0)
    graph = used_by(VARIANTS[name], methods.sparse_graph())
    for law in method_checks(defended(VARIANTS[name], rule), layout, graph):
        law()


def test_methods_that_add_up_or_multiply_take_no_defence() -> None:
    able = {name for name in METHODS if hasattr(METHODS[name], "defences")}
    others = {"mr-mtl", "scaffold", "fedalt", "fedtreelora", "flexlora", "fedex-lora", "flora"}
    assert set(METHODS) - able >= others
    assert not able & others
    assert METHODS["mira"](space="product").defences == ("clip",)


def seen(method: Method, far: float) -> tuple[Tensor, dict[int, float]]:
    """The rows [n,P] that the honest clients deploy, begin from and are pulled to once the liar sent a row that is all ``far``;
    and what each client counted for."""
    everyone = Groups(torch.zeros(CLIENTS).long())
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size), CLIENTS, everyone, 0.01, 4, rounds=4))
    work = method.broadcast(state, torch.arange(CLIENTS))
    draw, jobs = torch.Generator().manual_seed(0), len(work.client)
    rows = 1 + 0.1 * torch.randn(jobs, LAYOUT.size, generator=draw)
    rows[work.client == LIAR] = far
    if work.trainable is not None:
        rows = torch.where(work.trainable, rows, work.start)
    ones = torch.ones(jobs, dtype=torch.int64)
    trained = Trained(work.client, torch.arange(jobs), rows, ones, ones, ones, ones.double(), 0.01)
    change = method.aggregate(state, trained)
    if (offer := change.offer) is not None:  # the mean of the neighbours, in full: the most that a client can take
        last = torch.full((len(offer.client),), len(offer) - 1)
        change = settled(change, Choice(offer, last, unanswered(offer)))
    after = apply(state, change)
    work, deployed = method.broadcast(after, HONEST), method.deployed(after, HONEST)
    shown = torch.cat([deployed, work.start, *(() if work.anchor is None else (work.anchor,))])
    return shown, dict(change.of_clients.get(COUNTED, {}))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name in ABLE if name not in FEW])
def test_one_wrong_row_moves_nobody_far_and_is_named(name: str, rule: Robust) -> None:
    """Honest rows are about 1; the plain mean with one row of 1e6 is far above 100."""
    bare, _ = seen(VARIANTS[name], 1e6)
    rows, counted = seen(defended(VARIANTS[name], rule), 1e6)
    assert float(bare.abs().max()) > 100 or name in UNMOVED
    assert float(rows.abs().max()) < 100
    if name not in UNMOVED:
        assert counted[LIAR] < 0.2
        assert min(counted[k] for k in HONEST.tolist()) > 0.8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name in ABLE if name not in [*ONE_RANK, *HALVES, *FEW]])
def test_clients_of_unlike_ranks_are_defended_alike(name: str, rule: Robust) -> None:
    """Five clients have both ranks, two the first one alone: a wrong row of both ranks moves neither."""
    unlike = HeterogeneousRanks(VARIANTS[name], LAYOUT, torch.tensor([2, 2, 2, 2, 1, 1, 2]))
    rows, counted = seen(Defended(unlike, rule), 1e6)
    assert float(rows.abs().max()) < 100
    assert name in UNMOVED or counted[LIAR] < 0.3


@pytest.mark.parametrize(
    ("method", "robust", "message"),
    [
        ({"name": "scaffold"}, "clip", "server.robust=clip: the server step of method.name=scaffold is no plain mean"),
        ({"name": "mira", "space": "product"}, "median", "set server.robust=clip, or method.space=factors"),
        ({"name": "mira", "space": "rotated"}, "trimmed", "set server.robust=clip, or method.space=factors"),
    ],
)
def test_what_takes_no_defence_is_refused_with_what_does(method: dict[str, str], robust: str, message: str) -> None:
    training = {"optimizer": "sgd"} if method["name"] == "scaffold" else {}
    given = settings(Path("model"), Path("data"), method=method, server={"robust": robust}, training=training)
    with pytest.raises(UserError, match=re.escape(message)):
        Experiment(**given)
    Experiment(**given | {"server": {"robust": "none"}})
    if method["name"] == "mira":
        Experiment(**given | {"server": {"robust": "clip"}})


def test_a_client_decides_by_no_number_that_does_not_travel() -> None:
    """FedSA-LoRA shares A alone: a huge B of a client, which stays there, changes no weight of its A."""
    method = defended(VARIANTS["fedsa-lora"], "clip")
    assert method.name == "fedsa-lora"
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size), 4, Groups(torch.zeros(4).long()), 0.01, 4))
    rows = 1 + 0.1 * torch.randn(4, LAYOUT.size, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(4, dtype=torch.int64)
    trained = Trained(torch.arange(4), torch.arange(4), rows, ones, ones, ones, ones.double(), 0.01)
    huge = rows.clone()
    LAYOUT.entries[1].view(huge)[2] = 1e6
    a = [method.aggregate(state, replace(trained, rows=each)).of_clients[COUNTED] for each in (rows, huge)]
    assert a[0] == a[1]
