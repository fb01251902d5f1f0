"""Check that a method works with a kind of adapter, before a model is loaded.

The method itself decides, on the smallest layout of the kind. A comparison checks all its runs before the first one starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mira.core.errors import UserError
from mira.core.example_privacy import chooses_by_training_loss
from mira.core.graph import Groups
from mira.core.layout import Layout
from mira.core.offset import offset_of
from mira.core.robust import Robust
from mira.core.types import Method, ServerState, Setting
from mira.core.wire import Wire
from mira.methods import METHODS


def check(method: Method, layout: Layout, ranks_differ: bool, rounds: int, plain_sgd: bool) -> bool:
    """Tell whether ``method`` adds to the base's weights. Raises UserError if it cannot work on rows of ``layout``, not with the
    different ranks of its clients, not in ``rounds`` or not with the optimiser (``plain_sgd``: SGD without momentum)."""
    state = _begun(method, layout, ranks_differ, rounds, plain_sgd)
    return (
        isinstance(state, ServerState) and offset_of(state) is not None
    )  # anything else is refused with the base at hand


def check_base(method: Method, quantization: str, spreads: bool) -> None:
    """Raise UserError if the base cannot take the offset of ``method``, which adds to its weights."""
    what = f"method.name={method.name} adds to the base's weights"
    if quantization != "none":
        raise UserError(
            f"model.quantization={quantization}: {what}, and rounding the sum would lose much of it; set"
            " model.quantization=none, or method.name=fedit"
        )
    if spreads:
        raise UserError(
            f"engine: {what}, and workers share those that were loaded; leave engine.devices, engine.workers and engine.ray"
            " out"
        )


def check_wire(method: Method, wire: Wire | None) -> None:
    """Raise UserError where a site would add the rounding error of an adapter in the format ``wire`` to another adapter: a method
    with ``begins_anew`` draws one each round."""
    if wire not in (None, "fp32") and getattr(method, "begins_anew", False):
        raise UserError(
            f"server.wire={wire}: method.name={method.name} begins each round with a new adapter, to which the rounding error of"
            " the former one does not belong; set server.wire=fp32, or method.name=fedex-lora"
        )


def check_defence(method: Method, robust: Robust) -> None:
    """Raise UserError where the server step of ``method`` has no place for the rule ``robust``: its ``defences`` are empty or do
    not name it."""
    possible: Sequence[str] = getattr(method, "defences", ())
    if robust == "none" or robust in possible:
        return
    if possible:
        space = getattr(method, "space", "")
        raise UserError(
            f"server.robust={robust}: looks at single numbers of A and B, which say nothing where method.space={space}"
            f" mixes their products; set server.robust={possible[0]}, or method.space=factors"
        )
    able = ", ".join(sorted(name for name, found in METHODS.items() if hasattr(found, "defences")))
    raise UserError(
        f"server.robust={robust}: the server step of method.name={method.name} is no plain mean or mixture of adapters, and would"
        f" stay undefended; set server.robust=none, or method.name to one of {able}"
    )


def check_private(method: Method, layout: Layout, dropout: float) -> None:
    """Raise UserError where DP-SGD would not cover all that ``method`` or the adapter of ``layout`` learns from examples.

    ``dropout``: of the adapter; its masks come from the run's seed, one after the other, so that one example more changes those
    of others, and with them more gradients than its own.
    """
    if dropout:
        raise UserError(
            f"adapter.dropout={dropout:g}: an example changes the masks of others, which privacy.unit=example does not cover; set"
            " adapter.dropout=0"
        )
    if chooses_by_training_loss(method):
        raise UserError(
            f"privacy.unit=example: method.name={method.name} chooses by the loss on training examples, which has no noise;"
            " take another method"
        )
    if any(entry.factor == "seed" for entry in layout.entries):
        raise UserError("privacy.unit=example: adapter.kind=seeds has no gradients to clip; set adapter.kind=lora")


def check_uploads(method: Method) -> None:
    """Raise UserError where ``method`` would move adapters by losses on a site's data, which have no noise: privacy.unit=site
    covers all of these data."""
    if getattr(method, "strength", None) == "personal":
        raise UserError(
            "method.strength=personal: chooses by losses without noise, and privacy.unit=site covers all data of a site; leave"
            " method.strength out, which means 0.5, or set a number or similarity"
        )
    if chooses_by_training_loss(method):
        raise UserError(
            f"method.name={method.name}: chooses by losses without noise, and privacy.unit=site covers all data of a site; take"
            " another method"
        )


def check_untold(method: Method, metrics: str, by_epochs: bool) -> None:
    """Raise UserError where a run with privacy.metrics=``metrics``, not exact, would need what its clients do not tell: losses of
    several adapters for ``method``, or the number of examples for the steps of a round (``by_epochs``: training.local_epochs sets
    them)."""
    if by_epochs and metrics == "none":
        raise UserError(
            "privacy.metrics=none: training.local_epochs makes the number of steps tell the number of examples; set"
            " training.local_steps"
        )
    if chooses_by_training_loss(method) or getattr(method, "strength", None) == "personal":
        raise UserError(
            f"privacy.metrics={metrics}: method.name={method.name} chooses by losses, which clients do not tell; take a method or"
            " a method.strength that needs none"
        )


def trainings(method: Method, layout: Layout, rounds: int) -> int:
    """The number of times that a client which takes part in each of ``rounds`` trains an adapter."""
    state = _begun(method, layout, False, rounds, True)
    alone = torch.zeros(1, dtype=torch.int64)
    return sum(len(method.broadcast(replace(state, round=round), alone).client) for round in range(rounds))


def _begun(method: Method, layout: Layout, ranks_differ: bool, rounds: int, plain_sgd: bool) -> ServerState:
    alone = torch.zeros(1, dtype=torch.int64)
    rank = torch.full_like(alone, layout.rank) if ranks_differ else None
    start, graph = torch.zeros(layout.size), Groups(alone)
    return method.init(Setting(layout, start, 1, graph, 0.0, 0, rank, rounds, plain_sgd))
