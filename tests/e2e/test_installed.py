"""The built wheel, in an environment that holds nothing but it and the dependencies that its metadata name.

The dependencies are links to the distributions installed here: nothing is downloaded. A file that the wheel lacks, or a
package that a run imports and the metadata does not name, fails here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from helpers.sample_config import settings, write_clients

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist. Built from a copy, so that no stale build folder takes part."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    return out


def requirements(wheel: Path) -> list[Requirement]:
    with_metadata = next(iter(metadata.Distribution.discover(path=[str(wheel)])))
    assert with_metadata.metadata["Name"] == "mira-fl"
    found = [Requirement(line) for line in with_metadata.requires or []]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def link(requirement: Requirement, site: Path, done: set[str]) -> None:
    """Links the distribution of ``requirement``, and those it requires itself, into the folder ``site``."""
    for extra in ("", *requirement.extras):
        if (key := f"{requirement.name.lower()}[{extra}]") in done:
            continue
        done.add(key)
        found = metadata.distribution(requirement.name)
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] != ".."}:
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
        for line in found.requires or []:
            child = Requirement(line)
            if child.marker is None or child.marker.evaluate({"extra": extra}):
                link(child, site, done)


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and its dependencies alone."""
    folder = tmp_path_factory.mktemp("empty")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    interpreter = folder / "bin" / "python"
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        interpreter,
        "install",
        "-qq",
        "--no-deps",
        *built.glob("*.whl"),
        cwd=folder,
    )
    [site] = folder.glob("lib/python*/site-packages")
    done: set[str] = set()
    for requirement in requirements(site):
        link(requirement, site, done)
    return interpreter


def test_the_metadata_name_all_dependencies(python: Path) -> None:
    call(sys.executable, "-m", "pip", "--python", python, "check", cwd=python.parent)


def test_extras_and_tools_are_absent(python: Path) -> None:
    found = call(
        python,
        "-c",
        "from importlib.util import find_spec as f; print(f('flwr'), f('datasets'), f('pytest'))",
        cwd=python.parent,
    )
    assert found == "None None None\n"


def test_a_run_outside_the_repository(python: Path, tiny_folder: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = settings(tiny_folder, write_clients(tmp_path / "data.jsonl"), rounds=1)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values, default=str))))
    mira = python.parent / "mira"
    where = call(python, "-c", "import mira; print(mira.__file__)", cwd=tmp_path)
    assert where.startswith(str(python.parents[1]))
    assert call(mira, "--version", cwd=tmp_path) == f"mira {metadata.version('mira-fl')}\n"
    result = json.loads(call(mira, "run", "my.yaml", "--out", "out", "--json", cwd=tmp_path))
    assert result["rounds"] == 1
    assert (tmp_path / "out" / "adapters").is_dir()
    call(mira, "report", "out", cwd=tmp_path)
    assert "</html>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_sdist_holds_the_tests_and_examples(built: Path) -> None:
    [file] = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"configs/demo.yaml", "docs/index.md", "tests/conftest.py", "Makefile", "constraints.txt", "CHANGELOG.md"}
    assert wanted <= names
    assert not [name for name in names if name.endswith(".pyc")]
