"""The run folder: rows, metrics and all a run needs to go on, committed atomically round by round."""

from mira.store.run import Store

__all__ = ["Store"]
