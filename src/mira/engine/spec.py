"""The inputs of an engine: model, adapter layout, data and training settings of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from mira.adapters.types import PassAdapter
from mira.core.encoded import Encoded
from mira.core.example_privacy import Draws, ExamplePrivacy
from mira.core.layout import Layout
from mira.core.training import Training
from mira.core.types import Work
from mira.data.corpus import Corpus

Batches = Sequence[Sequence[Encoded]]  # of one job in a round: the sequences of each local step


@dataclass(frozen=True)
class Text:
    """Token ids that pad a sequence (``pad``) and end an answer (``stops``), and ``decode``: token ids -> text."""

    pad: int
    stops: frozenset[int]
    decode: Callable[[Sequence[int]], str]


def ignore_progress(tokens: int) -> None:
    """Discard a report of progress."""


@dataclass(frozen=True)
class EngineSpec:
    """A run as an engine computes it: rows of ``adapter`` on ``model``, trained and measured on ``corpus``.

    ``checkpointing``: recompute layers in the backward pass. ``progress``: called with the number of tokens of every pass.
    ``privacy``: train with DP-SGD; None: without noise.
    """

    model: PreTrainedModel
    text: Text
    adapter: PassAdapter
    corpus: Corpus
    training: Training
    seed: int
    checkpointing: bool = False
    progress: Callable[[int], None] = ignore_progress
    privacy: ExamplePrivacy | None = None

    @property
    def layout(self) -> Layout:
        return self.adapter.layout

    @property
    def dropout(self) -> float:
        """The probability that an input of the adapter is set to 0 in training."""
        return self.adapter.dropout

    def batches(self, work: Work, job: int, round: int) -> Batches:
        """The batches of a job; with DP-SGD Poisson samples, of which some may be empty."""
        client = int(work.client[job])
        if self.privacy is None:
            return self.corpus.batches(round, client)
        train = self.corpus.encoded(client, "train")
        steps, rate = self.training.steps_for(len(train)), self.privacy.rate(len(train))
        drawn = self.draws(work, job, round).sample(len(train), rate, steps)
        return [[train[n] for n in sample] for sample in drawn]

    def draws(self, work: Work, job: int, round: int) -> Draws:
        """The random choices of a job. Only for DP-SGD."""
        assert self.privacy is not None
        return self.privacy.draws(round, int(work.client[job]), work.kept_under[job])
