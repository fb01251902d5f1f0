"""Data: the sources of clients, their splits and batches, and the encoding of examples as tokens."""

from mira.core.registry import Registry
from mira.data.sources.builtin import Builtin
from mira.data.sources.dolly import Dolly
from mira.data.sources.hub import HubDataset
from mira.data.sources.jsonl import Jsonl
from mira.data.sources.memory import Memory
from mira.data.sources.natural_instructions import NaturalInstructions
from mira.data.sources.sites import Sites

SOURCES = Registry(
    "data",
    "source",
    "mira.sources",
    ("load",),
    None,
    {
        "builtin": Builtin,
        "natural-instructions": NaturalInstructions,
        "dolly": Dolly,
        "jsonl": Jsonl,
        "hub": HubDataset,
        "sites": Sites,
        "memory": Memory,
    },
)
