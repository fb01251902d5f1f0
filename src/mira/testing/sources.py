"""Laws of every data source."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from mira.data.federation import slug
from mira.data.types import Client, Example, Source
from mira.testing.checks import Check, bound, global_randomness_untouched, require, require_equal


def source_checks(source: Source, seed: int = 0) -> list[Check]:
    """The checks of the clients that ``source`` gives under ``seed``. It must be able to load them here and now."""
    return bound(LAWS, Case(source, seed))


@dataclass(frozen=True)
class Case:
    source: Source
    seed: int

    def load(self) -> list[Client]:
        return self.source.load(self.seed)


def gives_clients_with_names_of_their_own(case: Case) -> None:
    """A source gives at least one client; names are not empty, and none comes twice."""
    clients = case.load()
    require(clients, "load: no client")
    require(all(isinstance(client, Client) for client in clients), "load: gives something else than mira.Client")
    names = [client.name for client in clients]
    require(all(name.strip() for name in names), f"load: a client without a name in {names}")
    require_equal(len({slug(name) for name in names}), len(names), f"load: different names, of {names}")


def gives_examples_to_every_client(case: Case) -> None:
    """Every client has examples with a prompt and an answer, or says how many it has elsewhere."""
    for client in case.load():
        if client.elsewhere is not None:
            require(client.elsewhere >= 0 and not client.examples, f"{client.name}: has examples here and elsewhere")
            continue
        require(client.examples, f"{client.name}: has no example")
        for n, example in enumerate(client.examples):
            place = f"{client.name}: example {n}"
            require(isinstance(example, Example), f"{place} is no mira.Example")
            require(any(text.strip() for text in example.asked), f"{place} has no prompt")
            require(example.output.strip(), f"{place} has no answer")
            require(
                not example.messages or example.messages[-1].role == "assistant",
                f"{place}: the last turn is not the answer",
            )


def gives_the_same_for_a_seed(case: Case) -> None:
    """A second call gives equal clients in the same order, whatever was loaded in between."""
    first = case.load()
    case.source.load(case.seed + 1)
    require_equal(case.load(), first, "load: a second time")


def uses_no_shared_generator(case: Case) -> None:
    """Neither Python's nor torch's global generator decides what is loaded, and neither is drawn from."""
    first = case.load()
    before = random.getstate(), torch.get_rng_state()
    try:
        random.seed(1)
        torch.manual_seed(1)
        with global_randomness_untouched():
            require_equal(case.load(), first, "load: under another state of the global generators")
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])


LAWS = (
    gives_clients_with_names_of_their_own,
    gives_examples_to_every_client,
    gives_the_same_for_a_seed,
    uses_no_shared_generator,
)
