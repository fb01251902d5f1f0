"""The choice of an engine for a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mira.core.types import Engine
from mira.engine.attention.hook import CannotPackError
from mira.engine.batched import BatchedEngine
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and its ``name`` in the configuration. ``tokens_per_pass``: its budget; None: one client at a time."""

    engine: Engine
    name: str
    tokens_per_pass: int | None


def build_engine(
    spec: EngineSpec, name: str, *, tokens_per_pass: int | None, prefix: bool, longest: int, cuda_graphs: bool
) -> BuiltEngine:
    """Build the engine called ``name``: 'batched', 'reference', or 'auto' for the batched one where it can compute the model.

    The other arguments are those of ``BatchedEngine.of``. Raises CannotPackError where 'batched' cannot compute the model.
    """
    if name == "reference":
        return BuiltEngine(ReferenceEngine.of(spec), "reference", None)
    try:
        engine = BatchedEngine.of(
            spec, tokens_per_pass=tokens_per_pass, prefix=prefix, longest=longest, cuda_graphs=cuda_graphs
        )
    except CannotPackError as error:
        if name != "auto":
            raise
        log.warning("engine.name=auto: using 'reference', one client at a time: %s", error.reason)
        return BuiltEngine(ReferenceEngine.of(spec), "reference", None)
    if engine.fallback is not None:
        log.info(
            "engine.name=batched: passes are %s; transformers generates answers, one prompt at a time",
            engine.adapted.patched.kind,
        )
    return BuiltEngine(engine, "batched", engine.budget)
