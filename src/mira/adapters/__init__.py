"""Adapters: their kinds in the configuration, and their arithmetic. A kind is one class here and one line in ``ADAPTERS``."""

from mira.adapters.lora import Lora
from mira.adapters.prompt import VirtualPrompt
from mira.adapters.seeds import Seeds

ADAPTERS: dict[str, type] = {"lora": Lora, "prompt": VirtualPrompt, "seeds": Seeds}
