"""``mira report``: run folders as one page that can be read anywhere."""

from mira.results.html.write import write

__all__ = ["write"]
