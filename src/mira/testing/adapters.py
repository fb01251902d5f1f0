"""Laws of every kind of adapter, on a tiny random model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from mira.adapters.types import Adapter, AdapterKind
from mira.core.errors import UserError
from mira.core.seeds import generator
from mira.testing.checks import Check, bound, global_randomness_untouched, require, require_close, require_equal, same
from mira.testing.models import TOKENS, TinyBase, tiny_llama

LENGTH = 9  # tokens of the text
NOISE = 0.1  # of the row that is tried, on top of the start row
CLOSE = 1e-4  # logits of size 1 in float32


def adapter_checks(kind: AdapterKind, model: Callable[[], PreTrainedModel] = tiny_llama) -> list[Check]:
    """The checks of ``kind``, a section ``adapter`` of a configuration, on the model that ``model`` makes."""
    return bound(LAWS, Case(kind, model))


@dataclass(frozen=True)
class Case:
    """A kind of adapter and a function that makes its base model."""

    kind: AdapterKind
    make: Callable[[], PreTrainedModel]

    @cached_property
    def base(self) -> TinyBase:
        return TinyBase(self.make())

    @cached_property
    def adapter(self) -> Adapter:
        return self.kind.on(self.base, seed=0)

    @cached_property
    def row(self) -> Tensor:
        """A row [P] that does something."""
        start = self.adapter.start(0)
        return start + NOISE * torch.randn(start.shape, generator=generator("row"))

    @property
    def in_passes(self) -> bool:
        """True where engines compute the adapter beside the weights of the base, False where it is in them."""
        return self.adapter.in_pass.layout.size > 0

    def attached(self, row: Tensor) -> Any:
        """A model that computes with ``row``."""
        single = self.adapter.in_pass.attached(self.make())
        single.load(row)
        return single.module


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits [T,V] of ``model`` for a random text."""
    text = torch.randint(TOKENS, (1, LENGTH), generator=generator("text"))
    found: Tensor = model(input_ids=text).logits[0]
    return found.float()


def has_a_small_layout_without_a_model(case: Case) -> None:
    """smallest() gives a layout of some numbers, by which a method can be tried before a model is loaded."""
    require(0 < case.kind.smallest().size < 100_000, f"smallest(): {case.kind.smallest().size} numbers")


def lays_its_tensors_end_to_end(case: Case) -> None:
    """Entries of the layout cover the row, each number once."""
    end = 0
    for entry in case.adapter.layout.entries:
        require_equal(entry.offset, end, f"layout: the offset of {entry.module} {entry.factor}")
        end += prod(entry.shape)
    require_equal(case.adapter.layout.size, end, "layout: the numbers of a row")


def starts_from_the_seed_alone(case: Case) -> None:
    """start(seed) is a finite float32 row, the same each time, and draws from no shared generator."""
    first = case.adapter.start(0)
    case.adapter.start(1)
    second = case.kind.on(TinyBase(case.make()), seed=0)
    with global_randomness_untouched():
        again = second.start(0)
    require_equal(tuple(first.shape), (case.adapter.layout.size,), "start: the shape of the row")
    require_equal(first.dtype, torch.float32, "start: the type of the row")
    require(first.isfinite().all(), "start: a number is not finite")
    require_equal(again, first, "start: a second row of the same seed")


def holds_any_row(case: Case) -> None:
    """A row that is loaded into the attached model is there, number by number, and decides what the model computes."""
    if case.in_passes:
        single = case.adapter.in_pass.attached(case.make())
        single.load(case.row)
        require_equal(single.row().float(), case.row, "attached: the row that was loaded")
        moved = logits(single.module)
        single.load(case.adapter.start(0))
        require(
            not torch.allclose(moved, logits(single.module), atol=CLOSE), "attached: another row gives the same logits"
        )


def writes_a_folder_that_peft_reads(case: Case) -> None:
    """A saved row holds no pickle and is written the same twice; where the folder is PEFT's, PEFT computes the same with it."""
    with TemporaryDirectory(prefix="mira-testing-") as place:
        folders = Path(place) / "a", Path(place) / "b"
        for folder in folders:
            case.adapter.save(folder, case.row, "tiny")
        contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
        require(contents[0], "save: writes nothing")
        odd = [name for name in contents[0] if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
        require(not odd, f"save: writes pickles: {odd}")
        require(same(*contents), "save: a second folder of the same row differs")
        if "adapter_config.json" in contents[0]:
            require_close(
                logits(_read(case, folders[0])), logits(case.attached(case.row)), "logits of PEFT's own reading", CLOSE
            )


def _read(case: Case, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that it misses
        return PeftModel.from_pretrained(case.make(), folder)


def merges_to_the_same_model(case: Case) -> None:
    """A merged model computes as the attached one; a kind that cannot be merged says so by UserError."""
    try:
        with case.adapter.merged(case.row) as model:
            merged = logits(model)
    except UserError:
        return
    if case.in_passes:
        require_close(merged, logits(case.attached(case.row)), "logits of the merged model", CLOSE)
    else:
        require(not torch.allclose(merged, logits(case.base.model), atol=CLOSE), "merged: the row changes nothing")


def leaves_the_base_as_it_was(case: Case) -> None:
    """Neither weights nor modules of the base differ after start, save and merged, and nothing in it is trainable."""
    with _unchanged(case.base.model), TemporaryDirectory(prefix="mira-testing-") as place:
        adapter = case.kind.on(case.base, seed=0)
        adapter.start(0)
        adapter.save(Path(place) / "saved", case.row, "tiny")
        try:
            with adapter.merged(case.row):
                pass
        except UserError:
            pass
    require(not any(weight.requires_grad for weight in case.base.model.parameters()), "the base became trainable")


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    def now() -> tuple[dict[str, Tensor], dict[str, type]]:
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return weights, {name: type(module) for name, module in model.named_modules()}

    before = now()
    yield
    after = now()
    require_equal(after[1], before[1], "the base's modules")
    odd = [name for name, tensor in before[0].items() if not torch.equal(after[0][name], tensor)]
    require(not odd, f"the base's weights changed: {odd}")


LAWS = (
    has_a_small_layout_without_a_model,
    lays_its_tensors_end_to_end,
    starts_from_the_seed_alone,
    holds_any_row,
    writes_a_folder_that_peft_reads,
    merges_to_the_same_model,
    leaves_the_base_as_it_was,
)
