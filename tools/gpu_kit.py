"""``make gpu-kit``: collects the wheels that a machine with torch, transformers, PEFT and safetensors but without network lacks.

All are pure Python, but for pydantic_core, which is there for three versions of CPython on Linux x86-64. Versions are those of
constraints.txt. requirements.txt beside the wheels is for pip.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.kit import roots
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "gpu-kit"
MOST = 60_000_000  # bytes
THERE = ("torch", "transformers", "peft", "safetensors")  # with what they require
SPARE = ("peft", "typing-extensions")  # pure, and taken where the machine's are too old
PROJECT = "mira-fl"
COMPILED = ("pydantic-core",)
SOURCE = ("rouge-score",)  # the index has no wheel
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # what an earlier build of the project left
    OUT.mkdir(parents=True)
    pins = pinned() | {PROJECT: metadata.version(PROJECT)}
    names = needed()
    for name in names:
        if name == PROJECT:
            _wheel("--no-build-isolation", str(ROOT))
        elif name in COMPILED:
            for python in PYTHONS:
                platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
                _download(f"{name}=={pins[name]}", "--python-version", python, "--implementation", "cp", *platforms)
        elif name in SOURCE:
            _wheel(f"{name}=={pins[name]}")
        else:
            _download(f"{name}=={pins[name]}", "--platform", "any", "--implementation", "py", "--abi", "none")
    check(OUT, names)
    (OUT / "requirements.txt").write_text("".join(f"{name}=={pins[name]}\n" for name in names), encoding="utf-8")
    print(f"{OUT.relative_to(ROOT)}: {len(list(OUT.glob('*.whl')))} wheels, {size(OUT) / 1e6:.1f} MB")
    print("there: python -m pip install --no-index --no-deps --find-links KIT --target SITE -r KIT/requirements.txt")


def needed() -> list[str]:
    """The product, what its core and its tests require beyond what is there, and what may be too old there."""
    there = required(map(Requirement, THERE))
    return sorted((required(roots(ROOT / "pyproject.toml")) - there) | set(SPARE))


def required(first: Iterable[Requirement]) -> set[str]:
    """The names of ``first`` and of all that they require, as installed here."""
    todo, found = list(first), set[str]()
    while todo:
        requirement = todo.pop()
        name = str(canonicalize_name(requirement.name))
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        todo += map(Requirement, metadata.requires(name) or ())
    return found


def pinned() -> dict[str, str]:
    """Versions in constraints.txt, by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, version in pairs}


def check(kit: Path, names: Iterable[str]) -> None:
    """Raises SystemExit where a distribution is missing, one is compiled that should not be, or the kit is too large."""
    files = [parse_wheel_filename(file.name) for file in kit.glob("*.whl")]
    missing = set(names) - {str(name) for name, *_ in files}
    compiled = {str(name) for name, _, _, tags in files if any(tag.platform != "any" for tag in tags)} - set(COMPILED)
    if missing or compiled or size(kit) > MOST:
        raise SystemExit(
            f"{kit}: {size(kit) / 1e6:.1f} MB of at most {MOST / 1e6:.0f}; missing: {', '.join(sorted(missing)) or 'none'};"
            f" compiled, but not expected to be: {', '.join(sorted(compiled)) or 'none'}"
        )


def size(kit: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in kit.iterdir())


def _download(requirement: str, *options: str) -> None:
    _pip("download", "-qq", "--no-deps", "--only-binary=:all:", "--dest", str(OUT), *options, requirement)


def _wheel(*options: str) -> None:
    with TemporaryDirectory() as folder:
        _pip("wheel", "-qq", "--no-deps", "--wheel-dir", folder, *options)
        for file in Path(folder).glob("*.whl"):
            shutil.move(file, OUT / file.name)


def _pip(*words: str) -> None:
    if subprocess.run([*_PIP, *words]).returncode:
        raise SystemExit(f"pip {' '.join(words)}: failed")


if __name__ == "__main__":
    main()
