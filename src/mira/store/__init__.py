"""The store of a run folder: rows, metrics and the state for resuming, committed atomically round by round."""

from mira.store.run import Store

__all__ = ["Store"]
