"""LoRA as a section of the configuration.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022: y = W·x + s·B·A·x with A [r,in], B [out,r].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.pydantic_config import STRICT, Count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mira.adapters.types import Adapter, BaseLike


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lora:
    """LoRA (Hu et al. 2022): y = W·x + s·B·A·x."""

    kind: Literal["lora"] = "lora"
    rank: Count = 8
    """r, rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The scale s is alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that training sets to 0."""
    rslora: bool = False
    """Use the scale alpha / √rank (rsLoRA, Kalajdzievski 2023)."""
    targets: str | tuple[str, ...] = "auto"
    """Layers: a list of ends of their names, a regular expression, all-linear, or auto (PEFT's choice for the model, else the
    layers that mix tokens, such as attention). A list may name tensors of experts, such as experts.down_proj."""
    init: Literal["kaiming", "orthogonal"] = "kaiming"
    """Start values. kaiming: B is 0. orthogonal: A and B lie in orthogonal halves of an even rank, so their product is 0."""
    dora: bool = False
    """Also train the length of every row of W + s·B·A (DoRA, Liu et al. 2024); needs engine.name=reference."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of B and of DoRA's lengths as a multiple of training.lr, the rate of A (LoRA+, Hayou et al. 2024)."""
    start: Annotated[str, Field(min_length=1)] | None = None
    """A PEFT adapter that all clients start from: its folder, or its name on the model hub. Rank, scale, layers and base must be
    the run's. null: a new one."""

    def __post_init__(self) -> None:
        if self.init == "orthogonal" and self.start is not None:
            raise UserError("adapter.init=orthogonal: adapter.start gives the start; leave one of the two out")
        if self.init == "orthogonal" and self.rank % 2:
            raise UserError(
                f"adapter.init=orthogonal: needs an even rank, not adapter.rank={self.rank}; take rank={self.rank + 1}"
            )

    def check(self, experiment: Any) -> None:
        """Raise UserError where other sections do not go with this one."""
        if self.init == "orthogonal" and experiment.clients.rank:
            raise UserError("adapter.init=orthogonal: the product of fewer ranks is not 0; leave clients.rank out")

    def smallest(self) -> Layout:
        features = {"layers.0.x": (1, 1), "layers.1.x": (1, 1)}
        return Layout.of(features, self.rank, self.alpha, self.rslora, self.dora, self.lora_plus_ratio)

    def layout(self, model: PreTrainedModel) -> Layout:
        """The row layout on ``model``. Raises UserError where the targets name no linear layer."""
        from mira.adapters.lora_peft import features_of

        features = features_of(model, self.targets)
        experts = [name for name, shape in features.items() if len(shape) == 3]
        if experts and (self.dropout or self.dora):
            key, off = (f"dropout={self.dropout:g}", "dropout=0") if self.dropout else ("dora=true", "dora=false")
            raise UserError(
                f"adapter.{key}: not available for experts, since PEFT changes their tensors as a whole; set {off}, or leave"
                f" {experts[0].rsplit('.', 1)[-1]} out of targets"
            )
        return Layout.of(features, self.rank, self.alpha, self.rslora, self.dora, self.lora_plus_ratio)

    def on(self, base: BaseLike, seed: int) -> Adapter:
        """The adapter on ``base``, proven to be what PEFT reads from its folders."""
        # PEFT is imported here: the configuration is read without it.
        from mira.adapters.lora_peft import LoraAdapter
        from mira.adapters.peft_check import prove

        layout = self.layout(base.model)
        prove(base.model, layout)
        return LoraAdapter(base.model, layout, self.dropout, self.init, base, self.start)
