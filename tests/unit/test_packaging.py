"""constraints.txt pins everything that `make demo` and `make test` install, within what pyproject.toml promises."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
DECLARED = [Requirement(line) for group in GROUPS for line in group]


def pins() -> dict[str, Version]:
    """Package → version; any line but ``name==version`` fails here."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(lines), "a package is pinned twice"
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def installed_tree(roots: list[Requirement]) -> Iterator[tuple[Requirement, str]]:
    """Every requirement reached from ``roots`` through what is installed here, with the installed version."""
    todo, seen = list(roots), set[str]()
    while todo:
        requirement = todo.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found = metadata.distribution(requirement.name)
        yield requirement, found.version
        for line in found.requires or []:
            child = Requirement(line)
            extras = [{"extra": extra} for extra in requirement.extras or {""}]
            if child.marker is None or any(child.marker.evaluate(extra) for extra in extras):
                todo.append(child)


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_every_declared_dependency_has_a_pin_it_admits(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_everything_they_pull_in_is_pinned_too() -> None:
    pinned = pins()
    missing = {r.name for r, _ in installed_tree(DECLARED) if canonicalize_name(r.name) not in pinned}
    assert missing == set()


def test_what_flower_1_41_needs_is_pinned_beside_it() -> None:
    pinned = pins()
    assert pinned["flwr"].release[:2] == (1, 41)
    assert pinned["rich"] < Version("15")
    assert pinned["typer"] < Version("0.21")


def test_the_torch_pin_carries_no_local_label() -> None:
    assert pins()["torch"] == Version("2.13.0")
    assert all(version.local is None for version in pins().values())


def test_the_licence_is_whole_and_named_everywhere() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text()


def test_ci_calls_exactly_the_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == ["make test"]


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/Dockerfile"])
def test_the_dockerfiles_pass_the_linter(file: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint has no build for this platform")
    done = subprocess.run([hadolint, str(ROOT / file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
