"""What every kind of adapter is to the rooms above: what a row means on a base model, where it starts, how it leaves."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from mira.core.layout import Layout


class Adapter(Protocol):
    @property
    def layout(self) -> Layout: ...

    def start(self, seed: int) -> Tensor:
        """The common start row [P], float32."""
        ...

    def save(self, folder: Path, row: Tensor, base_name: str) -> None:
        """Write ``row`` [P] into ``folder``: as PEFT loads it, where PEFT has the kind."""
        ...

    def merged(self, row: Tensor) -> AbstractContextManager[PreTrainedModel]:
        """The base model with ``row`` [P] in its weights meanwhile; of a quantised one the model it was made of. Raises
        UserError where that cannot be."""
        ...
