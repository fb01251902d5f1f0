"""The data source of a site, from its option ``--data``."""

from __future__ import annotations

from pathlib import Path

from mira import config
from mira.config.yaml_io import read
from mira.data.sources.jsonl import OneFile
from mira.data.types import Source


def source_of(data: Path) -> Source:
    """The source at ``data``: a folder of data files, one data file, or a YAML file with the ``data`` section of a configuration.
    Raises UserError."""
    if data.is_file() and data.suffix not in (".yaml", ".yml"):
        return OneFile(data.absolute())
    section: object = {"source": "jsonl", "path": str(data.absolute())}
    if data.suffix in (".yaml", ".yml"):
        given = read(data)
        section = given.get("data", given)
    needed = {"rounds": 1, "model": {"name": "-"}, "training": {"local_steps": 1}}
    return config.resolved(config.parse({**needed, "data": section})).data
