"""The federation as tokens, for training and evaluation. Every example is encoded once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mira.core.errors import UserError
from mira.data import tokens
from mira.data.federation import SPLITS, Federation, SplitClient, batches
from mira.data.text import Encoded, Encoder
from mira.data.types import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """The encoded examples and batches of all clients. Local training is ``steps`` or ``epochs`` (exactly one) in batches of
    ``batch_size``. ``first``: the number of the first client; not 0 at a site, which has one client of many."""

    federation: Federation
    encoder: Encoder
    batch_size: int
    steps: int | None = None
    epochs: int | None = None
    first: int = 0
    _cache: dict[tuple[int, str], Sequence[Encoded]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_clients(self) -> int:
        return len(self.federation.clients)

    def num_train(self, client: int) -> int:
        return self._client(client).num_train

    def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
        """A client's examples of one split, at most the first ``limit``. Raises UserError where one does not fit."""
        if (client, split) not in self._cache:
            owner = self._client(client)
            examples = owner.split(split)
            places = [place_of(example, n, split, owner.name) for n, example in enumerate(examples)]
            self._cache[client, split] = tuple(self.encoder.encode_all(examples, places))
        return self._cache[client, split][:limit]

    def prompts(self, client: int, split: str, limit: int | None = None) -> list[tuple[int, ...]]:
        """The tokens before the answer, example by example."""
        return [encoded.asked for encoded in self.encoded(client, split, limit)]

    def references(self, client: int, split: str, limit: int | None = None) -> list[str]:
        """The reference answers of generated text, in the order of ``prompts``."""
        return [self.encoder.reference(example) for example in self._client(client).split(split)[:limit]]

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        """The batches of ``client`` in ``round``: one list for each local step."""
        train = self.encoded(client, "train")
        name, seed = self._client(client).name, self.federation.seed
        order = batches(seed, round, name, len(train), self.batch_size, self.steps, self.epochs)
        return [[train[i] for i in batch] for batch in order]

    def truncated(self) -> dict[str, int]:
        """The count of truncated examples of each client, over all splits. Encodes all examples, so that every length error is
        raised here."""
        return {
            owner.name: sum(item.truncated for split in SPLITS for item in self.encoded(number, split))
            for number, owner in enumerate(self.federation.clients, self.first)
        }

    def recall(self, folder: Path) -> None:
        """Read the encoded examples that ``keep`` left in ``folder``, if they are those of this federation and encoder."""
        if self._key is not None:
            found = tokens.read(folder, self._key, self.federation)
            self._cache.update({(k + self.first, split): encoded for (k, split), encoded in found.items()})

    def keep(self, folder: Path) -> None:
        """Write all encoded examples to ``folder``, for the next time that the same federation is opened."""
        if self._key is not None:
            everyone = range(self.first, self.first + self.num_clients)
            tokens.write(folder, self._key, {(k, split): self.encoded(k, split) for k in everyone for split in SPLITS})

    @cached_property
    def _key(self) -> str | None:
        return tokens.key(self.federation, self.encoder)

    def _client(self, number: int) -> SplitClient:
        return self.federation.clients[number - self.first]


def without_overlong(federation: Federation, encoder: Encoder) -> Federation:
    """``federation`` without the examples that are too long; their count for each client is logged. Raises UserError where a
    client has none left in a split."""
    clients, gone = [], {}
    for client in federation.clients:
        kept: dict[str, tuple[Example, ...]] = {}
        for split in SPLITS:
            examples = client.split(split)
            places = [place_of(example, n, split, client.name) for n, example in enumerate(examples)]
            fits = encoder.fits(examples, places)
            kept[split] = tuple(example for example, fit in zip(examples, fits, strict=True) if fit)
            if examples and not kept[split]:
                raise UserError(
                    f"prompt.overlong=drop: all {len(examples)} {split} examples of client '{client.name}' are longer than"
                    f" {encoder.max_length} tokens; set prompt.overlong=cut, or leave the client out"
                )
        clients.append(replace(client, train=kept["train"], validation=kept["validation"], test=kept["test"]))
        gone[client.name] = sum(len(client.split(split)) - len(kept[split]) for split in SPLITS)
    if which := ", ".join(f"{name} ({count})" for name, count in gone.items() if count):
        log.warning("examples of more than %d tokens left out: %s", encoder.max_length, which)
    return replace(federation, clients=tuple(clients))


def place_of(example: Example, number: int, split: str, client: str) -> str:
    """The name of an example in messages: by file and line, where it was read from a file."""
    return (
        f"{example.place} (client '{client}')"
        if example.place
        else f"example {number} of the {split} split of client '{client}'"
    )
