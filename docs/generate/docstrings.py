"""An extension of Griffe: brackets in docstrings are shapes and indices, never links of Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(``?[^`]+``?)")


class Brackets(Extension):
    """Escape ``[`` outside code, in the docstring of every object."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            parts = CODE.split(obj.docstring.value)
            obj.docstring.value = "".join(part if part.startswith("`") else part.replace("[", "\\[") for part in parts)
