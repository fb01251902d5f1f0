"""The inputs of an engine: model, adapter layout, data and training settings of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from mira.adapters.types import PassAdapter
from mira.core.layout import Layout
from mira.core.training import Training
from mira.data.corpus import Corpus


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
    """

    model: PreTrainedModel
    text: Text
    adapter: PassAdapter
    corpus: Corpus
    training: Training
    seed: int
    checkpointing: bool = False
    progress: Callable[[int], None] = ignore_progress

    @property
    def layout(self) -> Layout:
        return self.adapter.layout

    @property
    def dropout(self) -> float:
        """The probability that an input of the adapter is set to 0 in training."""
        return self.adapter.dropout
