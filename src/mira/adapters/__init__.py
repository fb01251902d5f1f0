"""Adapters: their kinds in the configuration, and their arithmetic. A kind is one class here and one line in ``ADAPTERS``."""

from mira.adapters.lora import Lora
from mira.adapters.prompt import VirtualPrompt
from mira.adapters.seeds import Seeds
from mira.core.registry import Registry

ADAPTERS = Registry(
    "adapter", "kind", "mira.adapters", ("on", "smallest"), "lora",
    {"lora": Lora, "prompt": VirtualPrompt, "seeds": Seeds},
)  # fmt: skip
