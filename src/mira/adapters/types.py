"""Protocols of adapters: a section of the configuration, the adapter it makes on a base model, and its part in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mira.core.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mira.adapters.directions import Directions


class BaseLike(Protocol):
    """The parts of a loaded base model that adapters are made from."""

    @property
    def name(self) -> str:
        """Its name on the model hub, or a folder."""
        ...

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def revision(self) -> str | None:
        """The hub's commit, where one was asked for."""
        ...

    @property
    def source(self) -> str:
        """The origin of its weights; "memory" for a model that a program gave."""
        ...

    @property
    def sha256(self) -> str:
        """The hash of its weights."""
        ...

    def unquantised(self) -> PreTrainedModel:
        """The model that a quantised one was made from; else the model itself."""
        ...


class AdapterKind(Protocol):
    """A section ``adapter`` of the configuration: a frozen dataclass with a ``kind`` and the kind's own fields.

    Two members are optional. A field ``dropout``: the share of the adapter's inputs that training sets to 0. A function
    ``check(experiment)``: raises UserError where other sections of the experiment do not go with this one.
    """

    @property
    def kind(self) -> str: ...

    def on(self, base: BaseLike, seed: int) -> Adapter:
        """The adapter on ``base`` in a run of ``seed``. Raises UserError where it does not fit."""
        ...

    def smallest(self) -> Layout:
        """The layout on a model of two layers with one feature each. It tells, before a model is loaded, whether a method works
        with this kind."""
        ...


@dataclass(frozen=True)
class SingleAdapterModel:
    """A model that computes with one adapter at a time, made by PEFT.

    ``parameters``: the adapter's, in the order of the layout's entries. ``added``: the modules that PEFT added, which are in
    training mode while the adapter is trained, so that its dropout is on; the base's own stay in eval mode. ``prepare``: called
    with each row [P] before it is loaded.
    """

    module: nn.Module
    layout: Layout
    parameters: Sequence[nn.Parameter] = ()
    added: Sequence[nn.Module] = ()
    prepare: Callable[[Tensor], None] = lambda row: None

    def __post_init__(self) -> None:
        self._train(False)  # PEFT makes its modules in training mode

    def views(self, row: Tensor) -> list[Tensor]:
        """The part of ``row`` [P] that belongs to each parameter."""
        return [entry.view(row) for entry in self.layout.entries]

    @torch.no_grad()
    def load(self, row: Tensor) -> None:
        """Set the parameters to ``row`` [P]."""
        self.prepare(row)
        for view, parameter in zip(self.views(row), self.parameters, strict=True):
            parameter.copy_(view)

    def row(self) -> Tensor:
        """The parameters as a row [P] on the CPU."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters]).cpu()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Switch the adapter's dropout on while the context is open."""
        try:
            self._train(True)
            yield
        finally:
            self._train(False)

    def _train(self, on: bool) -> None:
        for module in self.added:
            module.training = on


class PassAdapter(Protocol):
    """The part of an adapter that an engine computes in its passes."""

    @property
    def layout(self) -> Layout: ...

    @property
    def dropout(self) -> float: ...

    def attached(self, model: PreTrainedModel) -> SingleAdapterModel:
        """``model`` with the adapter attached by PEFT, which changes the modules it is given."""
        ...


@dataclass(frozen=True)
class Unadapted:
    """No adapter: engines compute the base alone, on rows of no numbers."""

    layout: Layout = field(default_factory=lambda: Layout(()))
    dropout: float = 0.0

    def attached(self, model: PreTrainedModel) -> SingleAdapterModel:
        return SingleAdapterModel(model, self.layout)


class Adapter(Protocol):
    """An adapter on a base model: the meaning of a row, its start, and its way out of a run."""

    @property
    def layout(self) -> Layout: ...

    @property
    def in_pass(self) -> PassAdapter:
        """The part that engines compute; ``Unadapted`` where a row changes the base's own weights."""
        ...

    @property
    def directions(self) -> Directions | None:
        """The random directions in the base's weights that a row has coefficients of, trained without gradients; None where
        gradients train the row."""
        ...

    def start(self, seed: int) -> Tensor:
        """The common start row [P], float32."""
        ...

    def save(self, folder: Path, row: Tensor, base_name: str) -> None:
        """Write ``row`` [P] into ``folder``: as PEFT loads it, where PEFT has the kind."""
        ...

    def merged(self, row: Tensor) -> AbstractContextManager[PreTrainedModel]:
        """The base model with ``row`` [P] merged into its weights, while the context is open; for a quantised base, the model it
        was made from. Raises UserError where that is not possible."""
        ...
