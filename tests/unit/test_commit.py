"""Which commit made a result: of the repository the package is tracked in, and dirty only by the package's own files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mira.core.git_commit import commit


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_and_whether_the_package_was_changed(tmp_path: Path) -> None:
    package, other = tmp_path / "src", tmp_path / "README"
    package.mkdir()
    other.write_text("a")
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    assert commit(package) is None  # not tracked
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    commit.cache_clear()
    other.write_text("b")  # a table of results, say
    assert commit(package) == head
    commit.cache_clear()
    (package / "__init__.py").write_text("changed = True")
    assert commit(package) == f"{head}-dirty"


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 128\n", "#!/bin/sh\nexit 0\n", None])
def test_without_a_git_that_answers_there_is_none(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "git").write_text(script)
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    commit.cache_clear()
    assert commit(tmp_path) is None
    commit.cache_clear()
