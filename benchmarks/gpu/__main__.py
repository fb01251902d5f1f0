"""``python -m benchmarks.gpu --first-look``: everything that the first minutes on a GPU should tell.

Writes a JSON file for each part at once, and summary.md and summary.json after each part. Beyond torch, transformers, PEFT and
safetensors it needs what ``make gpu-kit`` collects.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu import kit
from benchmarks.gpu.first_look import PARTS, Options, look

ROOT = Path(__file__).parents[2]
MINUTES = 8.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--first-look", action="store_true", required=True, help="run all parts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "gpu", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all parts together")
    parser.add_argument(
        "--kit", type=Path, default=os.environ.get("MIRA_GPU_KIT"), help="folder that make gpu-kit filled"
    )
    parser.add_argument("--device", default="cuda", help="cpu: only to try the script")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few tests: only to try the script")
    given = parser.parse_args()
    with TemporaryDirectory() as unpacked:
        taken = kit.unpacked(given.kit, ROOT / "pyproject.toml", Path(unpacked)) if given.kit else []
        if taken:
            print("from the kit:", ", ".join(taken), flush=True)
        elif missing := kit.lacking(ROOT / "pyproject.toml"):
            print(
                f"missing here: {', '.join(missing)}; parts that need them fail: give --kit, from make gpu-kit",
                flush=True,
            )
        path = [
            *(str(ROOT / part) for part in ("src", "tests", ".")),
            unpacked,
        ]  # the working tree before the product's wheel
        # Also for processes of other interpreters: the server of the parts, and pytest's workers.
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        sys.path[:0] = path
        return look(PARTS, Options(given.device, given.tiny), given.out, 60 * given.minutes)


if __name__ == "__main__":
    sys.exit(main())
