"""What README and docs show is true: every YAML block is valid, every command exists, the Python runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cache
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import typer
import yaml

import mira
from helpers.sample_config import settings, write_clients
from mira import Experiment, config
from mira.cli import app, joined
from mira.comparison import plan as comparison
from mira.config.experiment import SECTIONS

ROOT = Path(__file__).parents[2]
RAY_SCHEMA = Path(find_spec("ray").origin or "").parent / "autoscaler" / "ray-schema.json"  # type: ignore[union-attr]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", flags=re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for _, name, body in FENCED.findall(text) if name in (language, {"yaml": "yml"}.get(language))]


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Every `mira ...` in a document, and whether it must be complete: lines of code blocks, fenced or indented, must;
    code within a sentence need not."""
    prose = FENCED.sub("", text)
    fenced = "".join(body for _, name, body in FENCED.findall(text) if name in ("", "sh", "bash", "shell", "console"))
    indented = "".join(re.findall(r"^ {4}.*\n", prose, flags=re.MULTILINE))
    for line in (fenced + indented).replace("\\\n", " ").splitlines():
        if found := re.match(r"\s*(?:\$ )?(?:\S*/bin/)?(mira .*)", line):
            yield " ".join(found[1].split()), True
    for code in re.findall(r"`(mira [^`]+)`", prose):
        yield " ".join(code.split()), False


@cache
def command_line() -> Any:
    """The group of all commands; it takes 30 ms to make."""
    return typer.main.get_command(app)


def check_command(command: str) -> None:
    """Parses ``command`` as the command line would, without running it. Raises UsageError or UserError."""
    words = shlex.split(re.sub(r"[\[\]…]", " ", command), comments=True)
    words = words[: next((n for n, word in enumerate(words) if word in ("|", ">", ">>", "2>", "&&", ";")), None)]
    group = command_line()
    context, arguments = None, joined(words[1:])
    if arguments == ["--version"]:
        return
    while isinstance(group, click.Group):
        context = click.Context(group, parent=context, info_name=group.name)
        _, command_found, arguments = group.resolve_command(context, arguments)
        if not arguments and isinstance(command_found, click.Group):
            return  # a group by itself prints its help
        group = command_found
    with group.make_context(group.name, list(arguments), parent=context) as parsed:
        file = parsed.params.get("target") or parsed.params.get("file")
        if file is not None and (ROOT / file).is_file():
            read = comparison.load if group.name == "compare" else config.load
            read(ROOT / file, parsed.params.get("overrides") or [])


def completed(block: dict[str, Any]) -> dict[str, Any]:
    """A whole experiment that says what ``block`` says, which may show some sections only."""
    values = settings(Path("model"), Path("data"))
    for key, section in block.items():
        registry = SECTIONS.get(key)
        whole = not isinstance(section, dict) or (registry and registry.tag in section)
        values[key] = section if whole else {**values.get(key, {}), **section}
    if {"local_steps", "local_epochs"} <= values["training"].keys() and "local_epochs" in block.get("training", {}):
        del values["training"]["local_steps"]
    return values


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_yaml_block_is_valid(document: Path) -> None:
    for block in blocks(document.read_text(encoding="utf-8"), "yaml"):
        values = yaml.safe_load(block)
        if "entries" in values:
            comparison.parse(values)
            continue
        if "cluster_name" in values:  # not for mira: for ray up
            jsonschema.validate(values, json.loads(RAY_SCHEMA.read_text(encoding="utf-8")))
            continue
        Experiment(**values if {"model", "rounds", "training", "data"} <= values.keys() else completed(values))


def test_the_schema_sees_a_wrong_cluster() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"cluster_name": "x", "workers": 3}, json.loads(RAY_SCHEMA.read_text(encoding="utf-8")))


def test_scripts_for_bash_can_be_parsed() -> None:
    scripts = [body for file in DOCUMENTS for body in blocks(file.read_text(encoding="utf-8"), "bash")]
    assert any("#SBATCH" in script for script in scripts)
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_command_exists(document: Path) -> None:
    for command, complete in commands(document.read_text(encoding="utf-8")):
        try:
            with nullcontext() if complete else suppress(click.MissingParameter):
                check_command(command)
        except (click.ClickException, ValueError) as error:
            pytest.fail(f"{document.name}: '{command}': {error}")


def experiment_of(given: Any) -> Experiment:
    if isinstance(given, Experiment):
        return given
    return Experiment(**given) if isinstance(given, dict) else config.load(given)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
@pytest.mark.usefixtures("registries")
def test_the_python_that_uses_mira_runs(
    document: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny model, for one round, and on tiny data in the place of files; everything else as shown."""
    data = write_clients(tmp_path / "data.jsonl")
    whole, made = mira.run, list[mira.Run]()

    def small(given: Any, out: Any = None, **objects: Any) -> mira.Run:
        experiment = experiment_of(given)
        values = settings(tiny_folder, data, rounds=1, method=experiment.method)
        if experiment.data.source == "builtin":
            values["data"] = {"source": "builtin"}
        run = whole(Experiment(**values), out, **objects)
        made.append(run)
        return run

    monkeypatch.setattr(mira, "run", small, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    names: dict[str, Any] = {"__name__": "__main__"}  # a document's blocks build on each other
    for block in blocks(document.read_text(encoding="utf-8"), "python"):
        if re.search(r"^(from mira[. ]|import mira|mira\.)", block, flags=re.MULTILINE):
            exec(compile(block, document.name, "exec", dont_inherit=True), names)
    assert made or document.name != "README.md"
    for run in made:
        assert (run["rounds"], len(run["clients"])) == (1, len(run.clients))
        assert all(isfinite(client["loss"]) and client["loss"] != client["loss_start"] for client in run["clients"])


@pytest.mark.parametrize(
    "wrong",
    [
        "mira rnu configs/demo.yaml",
        "mira run",
        "mira run configs/demo.yaml --outt x",
        "mira run configs/demo.yaml --set training.lrr=0.1",
        "mira config chek x.yaml",
        "mira export RUN --format onnx",
        "mira generate RUN",
    ],
)
def test_the_check_sees_a_wrong_command(wrong: str) -> None:
    with pytest.raises((click.ClickException, ValueError)):
        check_command(wrong)


def test_commands_are_found() -> None:
    text = "a `mira run\nX` b\n\n    mira config schema\n    make demo\n\n```sh\n$ mira run X \\\n  --out Y\n```\n"
    assert list(commands(text)) == [
        ("mira run X --out Y", True), ("mira config schema", True), ("mira run X", False)
    ]  # fmt: skip


def test_there_is_something_to_check() -> None:
    texts = [file.read_text(encoding="utf-8") for file in DOCUMENTS]
    assert sum(len(list(commands(text))) for text in texts) >= 20
