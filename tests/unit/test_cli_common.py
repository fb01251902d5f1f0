"""What holds for every command: exit statuses, one-line errors, help, and names shown as they are.

What each command prints and writes is in test_cli_commands.py.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.documented_json import PAGES
from helpers.sample_config import mira, snapshot, write_clients, write_config
from mira.cli import app
from mira.core.versions import version_of
from mira.runner.progress import RunProgress

# Errors


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run"], "Missing argument 'CONFIG'. (see: mira run --help)"),
        (["run", "a.yaml", "--foo"], "Did you mean '--out'? (see: mira run --help)"),
        (["rnu"], "No such command 'rnu'"),
        (["run", "a.yaml", "b.yaml"], "Got unexpected extra argument"),
        (["generate", "RUN"], "Missing option '--client'"),
        (["generate", "RUN", "--client", "a", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["evaluate", "RUN", "--round", "7"], "'7' is not one of 'last', 'best'"),
        (
            ["export", "RUN", "--all", "--format", "onnx"],
            "'onnx' is not one of 'peft', 'vllm', 'sglang', 'lorax', 'gguf'",
        ),
        (["export", "RUN"], "export: name the clients with --client NAME (repeatable), or give --all"),
        (["export", "RUN", "--all", "--client", "ann"], "export: name the clients with --client NAME"),
        (["run", "nonexistent.yaml"], "nonexistent.yaml: cannot be read (No such file or directory)"),
        (["config", "check", "nonexistent.yaml"], "nonexistent.yaml: cannot be read (No such file or directory)"),
        (["evaluate", "nowhere"], "nowhere: there is no run here"),
        (["generate", "nowhere", "--client", "ann"], "nowhere: there is no run here"),
        (["export", "nowhere", "--all"], "nowhere: there is no run here"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    arguments: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error in mira(*arguments).error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("training.lrr=0.1", "training.lrr: unknown key; did you mean 'lr'?"),
        ("trainig.lr=0.1", "trainig: unknown key; did you mean 'training'?"),
        ("method.name=mirra", "did you mean 'mira'?"),
        ("method.strengh=0.1", "did you mean 'strength'?"),
        ("training.lr=fast", "training.lr='fast'"),
        ("training.lr", "override 'training.lr': must be key=value"),
        ("rounds=0", "rounds=0"),
        ("data.path=absent", "absent': no such file or folder"),
        ("model.name=absent/", "model.name='absent/': not found"),
        ("split.train=99", "client 'ann' has 8 different examples, fewer than"),
        ("adapter.targets=[q_prj]", "adapter.targets: no linear layer is named 'q_prj'; did you mean 'q_proj'?"),
    ],
)
def test_a_faulty_setting_is_one_line_and_makes_no_run(override: str, error: str, file: Path) -> None:
    assert error in mira("run", file, "--out", file.parent / "run", "--set", override).error
    assert not (file.parent / "run").exists()


def test_a_fault_that_spans_lines_is_one_line(file: Path) -> None:
    broken = file.with_name("a\nb.yaml")
    broken.write_text("rounds: [1\n", encoding="utf-8")
    assert "b.yaml, line 2: not valid YAML" in mira("run", broken).error


def test_an_error_cannot_command_the_terminal(file: Path) -> None:
    data = file.parent / "data.jsonl"
    data.write_text(json.dumps({"client": "ann", "prompt": "a", "completion": "b", "group\x1b]0;owned\x07": 1}) + "\n")
    error = mira("config", "check", file).error
    assert "group\\x1b]0;owned\\x07" in error


def test_a_bug_of_ours_is_a_traceback() -> None:
    program = "import mira.cli as cli\ncli.app = lambda **_: 1 / 0\ncli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in done.stderr


def test_a_command_goes_on_where_nobody_reads_its_messages() -> None:
    program = "from mira.cli.terminal import print_json, say\nsay('one')\nsay('two')\nprint_json({'a': 1})"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, '{"a": 1}\n')


def test_results_that_nobody_reads_end_a_command_without_a_traceback() -> None:
    program = "import mira.cli as cli\nfrom mira.cli.terminal import print_json\n"
    program += "@cli.app.command()\ndef told(): print_json({'a': 1})\ncli.main()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program, "told"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_streams_that_are_closed_count_as_unread(tmp_path: Path) -> None:
    program = "import mira.cli as cli\nfrom mira.cli.terminal import print_json, say\n"
    program += "cli.app = lambda **_: (say('one'), print_json({'a': 1}), open('file', 'w').close()) and 3\ncli.main()"
    closed = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", program]
    assert subprocess.run(closed, cwd=tmp_path, check=False).returncode == 3
    assert (tmp_path / "file").read_text() == ""


def test_help_does_not_wait_for_the_deep_learning_libraries() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = [str(Path(sys.executable).with_name("mira")), "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "evaluate" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    loaded = (
        "import sys, mira.cli; print(*[name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("command", [[], ["config"]])
def test_without_a_command_the_help(command: list[str]) -> None:
    ended = mira(*command)
    assert ended.status == 2
    assert "Usage: mira" in ended.out + ended.err
    assert "error:" not in ended.err


def test_the_version() -> None:
    ended = mira("--version")
    assert (ended.status, ended.out) == (0, f"mira {version_of('mira')}\n")


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RunProgress.round

    def interrupted(self: RunProgress, record: dict[str, Any]) -> None:
        whole(self, record)
        raise KeyboardInterrupt

    folder = file.parent / "a run"
    with monkeypatch.context() as patched:
        patched.setattr(RunProgress, "round", interrupted)
        ended = mira("run", file, "--out", folder)
    assert ended.status == 130
    assert ended.out == ""
    assert ended.err.endswith(f"interrupted; committed rounds are kept, go on with: mira run '{folder}' --resume\n")
    assert mira("run", folder, "--resume").status == 0


# Names


HOSTILE = (
    "[red]x[/red]", "[/]", "[bold", ":smile:", "../../x", "/etc/x", "a/b", "..", ".hidden", "-rf", "$(touch x)", "😀", "n" * 300,
    "CON", "a b", "\\", "{x}", "%s",
)  # fmt: skip


@pytest.mark.slow
def test_names_are_shown_as_they_are_and_write_nothing_outside(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = tmp_path / "outer"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    file = write_config(outer / "config.yaml", tiny_folder, write_clients(outer / "data.jsonl", HOSTILE), rounds=1)
    before = snapshot(tmp_path)
    folder = inner / "[red]run"
    poisoned = sorted(HOSTILE).index("[/]")
    whole = torch.isfinite

    def some_fail(tensor: torch.Tensor) -> torch.Tensor:
        good = whole(tensor)
        if tensor.shape == (len(HOSTILE),):
            good[poisoned] = False
        return good

    with monkeypatch.context() as patched:
        patched.setattr("mira.core.loop.torch.isfinite", some_fail)
        ended = mira("run", file, "--out", folder, "--json")
    assert ended.status == 0, ended.err
    assert "run folder " + str(folder) in ended.err
    assert "round 1 lost [/]: adapter is not finite" in ended.err
    result = json.loads(ended.out)
    assert sorted(client["name"] for client in result["clients"]) == sorted(HOSTILE)
    for client in result["clients"]:
        assert Path(client["adapter"]).resolve().parent == folder / "adapters"
    table, evaluated = mira("run", folder, "--resume"), mira("evaluate", folder)
    for text in (table.out, evaluated.out):
        folded = "".join(re.findall("^ *(n+)(?= |$)", text, flags=re.MULTILINE))
        assert [name for name in HOSTILE if name not in text + folded] == []
    exported = mira("export", folder, "--all", "--format", "vllm")
    assert exported.status == 0, exported.err
    assert mira("generate", folder, "--client", "../../x", "--max-new-tokens", "1").status == 0
    assert "no client is named '[/red]'" in mira("generate", folder, "--client", "[/red]").error
    after = snapshot(tmp_path)
    new = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("outer/inner/[red]run/") for name in new)
    assert [entry.name for entry in inner.iterdir()] == ["[red]run"]


def test_every_command_has_a_page_with_its_options() -> None:
    import click
    import typer

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))

    def check(name: str, command: Any) -> None:
        if isinstance(command, click.Group):
            for inner, found in command.commands.items():
                check(f"{name} {inner}", found)
        else:
            assert text.count(f"<!-- options: {name} -->") == 1

    check("mira", typer.main.get_command(app))


def test_bytes_that_are_not_utf8_are_one_line(file: Path) -> None:
    refused = mira("generate", file, "--client", "a", "--prompt", "caf\udce9").error
    assert refused == r"argument 'caf\udce9': is not UTF-8; give it in a terminal that is set to UTF-8"


@pytest.mark.parametrize("weight", ["1e308", "1e101"])
def test_weights_that_no_sum_can_hold_are_one_line(weight: str, file: Path, tmp_path: Path) -> None:
    edges = tmp_path / "edges.csv"
    edges.write_text(f"source,target,weight\nann,bob,{weight}\nann,cleo,{weight}\n")
    refused = mira("config", "check", file, "--set", f"graph={{name: file, path: {edges}}}").error
    assert refused.endswith(f"line 2: weight '{weight}' is above 1e+100; scale all weights down")


def test_the_command_needs_no_installed_script() -> None:
    """As docs/cuda.md has it for a machine without network."""
    done = subprocess.run([sys.executable, "-m", "mira.cli", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"mira {version_of('mira')}\n"), done.stderr
