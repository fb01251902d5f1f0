"""A folder of wheels for a machine without network: which of them the machine lacks, and how they are used there."""

from __future__ import annotations

import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

TOOLS = ("pytest", "pytest-xdist")  # of pyproject's extra "dev": what tests of the engine need


def roots(pyproject: Path) -> list[Requirement]:
    """The product, the requirements of its core, and the tools of the tests that a GPU is tried with."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    dev = [Requirement(line) for line in project["optional-dependencies"]["dev"]]
    core = [Requirement(line) for line in (project["name"], *project["dependencies"])]
    return [*core, *(each for each in dev if each.name in TOOLS)]


def unpacked(kit: Path, pyproject: Path, into: Path) -> list[str]:
    """Unpack into ``into`` what this machine lacks, or has in a version that is not admitted. Returns the names.

    Raises SystemExit where ``kit`` holds no wheel.
    """
    wheels = fitting(kit)
    if not wheels:
        raise SystemExit(f"--kit={kit}: no wheel for this Python in it; give the folder that `make gpu-kit` filled")
    taken: list[str] = []
    todo = roots(pyproject)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in taken or name not in wheels or admitted(requirement):
            continue
        with zipfile.ZipFile(wheels[name]) as wheel:
            wheel.extractall(into)
            todo += needed_by(wheel)
        taken.append(name)
    return sorted(taken)


def lacking(pyproject: Path) -> list[str]:
    """Needs of the parts that this machine lacks, or has in a version that is not admitted."""
    _, *others = roots(pyproject)
    return sorted(each.name for each in others if not admitted(each))


def fitting(kit: Path) -> dict[str, Path]:
    """The wheels in ``kit`` that this interpreter can use, by the name of their distribution."""
    tags, found = frozenset(sys_tags()), {}
    for file in sorted(kit.glob("*.whl")):
        name, _, _, offered = parse_wheel_filename(file.name)
        if not tags.isdisjoint(offered):
            found[str(name)] = file
    return found


def needed_by(wheel: zipfile.ZipFile) -> list[Requirement]:
    """The requirements of a wheel without extras."""
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = Parser().parsestr(wheel.read(name).decode(), headersonly=True).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def admitted(requirement: Requirement) -> bool:
    """Tell whether the machine has the distribution in a version that ``requirement`` admits."""
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
