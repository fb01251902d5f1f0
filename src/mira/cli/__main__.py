"""``python -m mira.cli``: the command ``mira`` where no script of that name is installed."""

from __future__ import annotations

from mira.cli import main

if __name__ == "__main__":
    main()
