"""The built wheel, in an environment that holds nothing but it and the dependencies that its metadata name.

A file that the wheel lacks, or a package that a run imports and the metadata does not name, fails here.
"""

from __future__ import annotations

import json
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.fresh_environment import ROOT, build, call, environment
from helpers.sample_config import settings, write_clients

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out, tmp_path_factory.mktemp("source"))
    return out


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and its dependencies alone."""
    return environment(tmp_path_factory.mktemp("empty"), *built.glob("*.whl"))


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
