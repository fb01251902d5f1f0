"""Fresh environments: an interpreter that finds nothing but the given wheels and the dependencies that their metadata name.

The dependencies are links to the distributions installed here: nothing is downloaded.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, out: Path, copy: Path, *kind: str) -> None:
    """Build the project in ``source`` into ``out``, from a ``copy`` of what git knows of it: no stale build folder takes part.
    ``kind``: --wheel; none: the sdist, and the wheel from it."""
    for name in call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=source).splitlines():
        if (source / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((source / name).read_bytes())
    call(sys.executable, "-m", "build", "--no-isolation", *kind, "--outdir", out, copy, cwd=copy)


def environment(folder: Path, *wheels: Path, extras: tuple[str, ...] = ()) -> Path:
    """The interpreter of an environment in ``folder`` with ``wheels`` and the dependencies of mira-fl and its ``extras``."""
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    interpreter = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-qq", "--no-deps")
    call(*pip, *wheels, cwd=folder)
    [site] = folder.glob("lib/python*/site-packages")
    done: set[str] = set()
    for requirement in requirements(site, extras):
        link(requirement, site, done)
    for name in {key.partition("[")[0] for key in done}:
        write_commands(name, interpreter)
    return interpreter


def write_commands(distribution: str, interpreter: Path) -> None:
    """The commands of a distribution, run by ``interpreter``, as pip writes them."""
    for point in metadata.distribution(distribution).entry_points.select(group="console_scripts"):
        command = interpreter.parent / point.name
        lines = (
            f"#!{interpreter}",
            "import sys",
            f"from {point.module} import {point.attr}",
            f"sys.exit({point.attr}())",
        )
        command.write_text("\n".join(lines) + "\n")
        command.chmod(0o755)


def requirements(site: Path, extras: tuple[str, ...] = ()) -> list[Requirement]:
    """The requirements of mira-fl as installed in ``site``."""
    [found] = metadata.Distribution.discover(path=[str(site)], name="mira-fl")
    named = [Requirement(line) for line in found.requires or []]
    return [each for each in named if any(not each.marker or each.marker.evaluate({"extra": e}) for e in ("", *extras))]


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
