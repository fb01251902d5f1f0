"""``mira report``: run folders as one page that can be read anywhere."""

from mira.results.html.write import of_run, write

__all__ = ["of_run", "write"]
