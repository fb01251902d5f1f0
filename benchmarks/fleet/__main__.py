"""``python -m benchmarks.fleet [start|overhead|memory|hundred]``: all figures that are not in benchmarks/out/fleet.json yet."""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.fleet import figures
from mira.core.versions import version_of

OUT = Path(__file__).parents[1] / "out" / "fleet.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*figures.PARTS, []], help="which figures; default: all")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    given = parser.parse_args()
    for part in given.part or figures.PARTS:
        for name, measure in figures.PARTS[part].items():
            if given.again or name not in _read():
                print(f"{name} …", flush=True)
                try:
                    value = measure()
                except MemoryError as error:
                    value = {"not measured": str(error)}
                _write(_read() | {name: {**value, **_around()}})
    for name, value in _read().items():
        print(f"{name}: {json.dumps({key: v for key, v in value.items() if key != 'around'})}")


def _read() -> dict[str, Any]:
    return dict(json.loads(OUT.read_text(encoding="utf-8"))) if OUT.exists() else {}


def _write(results: dict[str, Any]) -> None:
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _around() -> dict[str, Any]:
    return {"around": {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "load": [round(n, 2) for n in os.getloadavg()],
        "versions": {name: version_of(name) for name in ("mira", "flwr", "torch")},
    }}  # fmt: skip


if __name__ == "__main__":
    main()
