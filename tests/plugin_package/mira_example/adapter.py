"""A kind of adapter: (IA)³, as PEFT has it (Liu et al., NeurIPS 2022)."""

from dataclasses import dataclass

from peft import IA3Config

from mira.adapters.peft import PeftAdapter, smallest
from mira.adapters.types import Adapter, BaseLike
from mira.core.layout import Layout


@dataclass(frozen=True)
class Ia3:
    """A trained factor for every output of keys and values, and for every input of the feed-forward layers."""

    kind: str = "ia3"
    attention: tuple[str, ...] = ("k_proj", "v_proj")
    """Layers whose outputs are scaled."""
    feedforward: tuple[str, ...] = ("down_proj",)
    """Layers whose inputs are scaled."""

    def on(self, base: BaseLike, seed: int) -> Adapter:
        targets = [*self.attention, *self.feedforward]
        return PeftAdapter.of(base, IA3Config(target_modules=targets, feedforward_modules=list(self.feedforward)))

    def smallest(self) -> Layout:
        return smallest()
