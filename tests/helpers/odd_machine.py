"""A worker of a comparison whose machine has another processor where the variable ODD_MACHINE is set. Ray's nodes import it."""

from __future__ import annotations

import os
from typing import Any

from mira.comparison import machines
from mira.comparison.remote import Remote


class OddRemote(Remote):
    def __init__(self, *given: Any) -> None:
        if "ODD_MACHINE" in os.environ:
            known = machines.machine()
            machines.machine = lambda: known | {"processor": "Odd"}
        super().__init__(*given)
