"""What each command prints and writes: run and evaluate, config, generate and export.

Errors, help and strange names are in test_cli_common.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.documented_json import TYPES, documented, fields, one_object, part
from helpers.sample_config import NAMES, begin, mira, snapshot, write_clients, write_config
from mira import config, run
from mira.config import load
from mira.runner.progress import RunProgress


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a finished run of it, to look at."""
    base = tmp_path_factory.mktemp("cli")
    data = write_clients(base / "data.jsonl")
    write_config(base / "config.yaml", tiny_folder, data, method={"strength": 0.5})  # its best round is not the last
    run(load(base / "config.yaml"), base / "run")
    return base


# run and evaluate


def as_documented(out: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """The one object that was printed, and its fields, each there as docs/commands/run.md says."""
    result, expected = one_object(out), documented("mira run")
    found = list(fields(result))
    assert {name for name, _ in found} == set(expected)
    for name, value in found:
        assert isinstance(value, TYPES[expected[name]]), f"{name}={value!r} is not {expected[name]}"
        assert not isinstance(value, bool)
    return result, found


@pytest.mark.parametrize("generate", [True, False])
def test_run_prints_one_json_object_as_documented(generate: bool, file: Path) -> None:
    folder = file.parent / "run"
    ended = mira("run", file, "--out", folder, "--json", "--set", f"evaluation.generate={str(generate).lower()}")
    assert ended.status == 0, ended.err
    result, found = as_documented(ended.out)
    for name, value in found:
        if value is None:
            assert re.search("exact_match|rouge_l", name), f"{name} was not measured"
            assert not generate
    assert result["run"] == str(folder)
    assert result["rounds"] == 3
    assert [client["name"] for client in result["clients"]] == list(NAMES)
    assert result["peak_memory_bytes"] > 10 * 2**20
    assert result["bytes_up"] == 3 * 4 * 4 * load_file(folder / "start.safetensors")["start"].numel()
    assert result["bytes_down"] == 3 * result["bytes_up"], "a choice of strength offers two more adapters"
    for client in result["clients"]:
        assert (Path(client["adapter"]) / "adapter_config.json").is_file()


def test_time_and_memory_fields_are_the_documented_ones(base: Path) -> None:
    volatile = ("seconds", "tokens_per_second", "peak_memory_bytes")
    text = " ".join(part("mira run").split())
    assert "The time and memory fields are `seconds`, `tokens_per_second` and `peak_memory_bytes`" in text
    records = [json.loads(line) for line in (base / "run" / "metrics.jsonl").read_text().splitlines()]
    for record in records[1:]:
        assert all(record[name] > 0 for name in volatile)
    assert records[0]["peak_memory_bytes"] > 0


def test_evaluate_prints_one_json_object_as_documented(base: Path) -> None:
    before = snapshot(base / "run")
    ended = mira("evaluate", base / "run", "--json")
    assert ended.status == 0, ended.err
    result, found = as_documented(ended.out)
    finished = one_object(mira("run", base / "run", "--resume", "--json").out)
    best_answers = re.compile("best")  # measured when a run ends; here only if it is the round asked for
    assert {name for name, value in found if value is None} <= {name for name, _ in found if best_answers.search(name)}
    for key in ("run", "method", "rounds", "local_loss_start", "local_loss", "global_loss", "bytes_up", "seconds"):
        assert result[key] == finished[key]
    for now, then in zip(result["clients"], finished["clients"], strict=True):
        assert all(now[key] == then[key] for key in then if "match_best" not in key and "l_best" not in key)
    assert snapshot(base / "run") == before


def test_evaluate_the_best_round(base: Path) -> None:
    finished = json.loads((base / "run" / "result.json").read_text())
    assert finished["best"]["round"] == 2, "the scenario should have a best round that is not the last"
    result = one_object(mira("evaluate", base / "run", "--round", "best", "--json").out)
    assert result["rounds"] == 2
    assert result["local_loss"] == finished["best"]["local_loss"]
    assert result["best"] == finished["best"]


def test_evaluate_a_run_under_way(file: Path) -> None:
    folder = begin(load(file, ["evaluation.generate=false"]), file.parent / "run", rounds=1)
    result = one_object(mira("evaluate", folder, "--json").out)
    assert result["rounds"] == 1
    assert [client["adapter"] for client in result["clients"]] == [None] * len(NAMES)
    assert result["exact_match_start"] is None
    assert result["exact_match"] is not None
    table = mira("evaluate", folder)
    assert table.status == 0
    assert "– → 0.00" in table.out


def test_plain_lines_where_there_is_no_terminal(file: Path) -> None:
    ended = mira("run", file, "--out", file.parent / "run")
    assert ended.status == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ended.out + ended.err)
    lines = [line for line in ended.err.splitlines() if line.startswith("round ")]
    assert [line.split(" · ")[0] for line in lines] == ["round 1/3", "round 2/3", "round 3/3"]
    assert re.fullmatch(
        r"round 2/3 · 4 clients · train loss [\d.]+ · validation [\d.]+ · \d+ tokens/s · [\d.]+ s · about \d+ s left",
        lines[1],
    )
    assert ended.out.splitlines()[0].startswith("mira, 3 rounds")
    assert "run folder" in ended.out


def test_a_terminal_that_knows_no_unicode(base: Path) -> None:
    program = "import sys, mira.cli as cli\ncli.app = lambda **_: cli.out_console.print('loss → é')\ncli.main()"
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "loss \\u2192 \\xe9\n")


# config


def test_config_show_is_a_configuration_again(file: Path) -> None:
    ended = mira("config", "show", file, "--set", "training.lr=0.125")
    assert ended.status == 0
    shown = config.parse_text(ended.out)
    assert shown == load(file, ["training.lr=0.125"])
    assert "momentum: 0.0" in ended.out


def test_config_check(file: Path) -> None:
    ended = mira("config", "check", file)
    assert (ended.status, ended.out) == (
        0, f"prompts: alpaca (text), answers end with <eos>\n{file}: fine; 4 clients, 3 rounds of mira\n"
    )  # fmt: skip
    assert "no such file or folder" in mira("config", "check", file, "--set", "data.path=absent").error
    assert "have no group" in mira("config", "check", file, "--set", "data.group_column=null").error
    unknown = mira("config", "check", file, "--set", "clients={rank: {bop: 1}}").error
    assert unknown == "clients.rank.bop=1: no client is named 'bop'; did you mean 'bob'?"


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        ("{unit: example, noise: 1.0, clip: 1.0, delta: 0.3}", "privacy.delta=0.3: is no protection for 4 examples"),
        (
            "{unit: example, epsilon: 0.5, clip: 1.0, metrics: noised}",
            "leave nothing for the training; raise epsilon, metrics_noise or evaluation.every",
        ),
        ("{noise: 8.0, clip: 1.0}", "one process has no sites; set privacy.unit=example"),
    ],
)
def test_config_check_refuses_the_privacy_that_a_run_refuses(
    file: Path, tmp_path: Path, privacy: str, told: str
) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    given = [file, "--set", f"privacy={privacy}"]
    refused = mira("config", "check", *given).error
    assert told in refused
    assert f"error: {refused}\n" in mira("run", *given, "--out", tmp_path / "run").err
    if "delta" in privacy:  # without the tokenizer too
        assert mira("config", "check", *given, "--set", "model.name=nobody/nothing").error == refused


def test_config_check_of_a_federation_over_machines(file: Path) -> None:
    ended = mira("config", "check", file, "--set", "data={source: sites, groups: {ann: north}}")
    assert (ended.status, ended.out) == (
        0,
        f"{file}: fine for mira server; 3 rounds of mira; each site checks its own data\n",
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["privacy={unit: example, noise: 1.0, clip: 1.0, simulation: true}"], "sites draw noise of their own"),
        (
            ["privacy={noise: 8.0, clip: 1.0}", "method.strength=personal"],
            "method.strength=personal: chooses by losses",
        ),
    ],
)
def test_config_check_refuses_what_a_server_refuses(file: Path, settings: list[str], told: str) -> None:
    given = [
        argument
        for setting in ["data={source: sites, groups: {ann: north}}", *settings]
        for argument in ("--set", setting)
    ]
    assert told in mira("config", "check", file, *given).error


def test_config_schema() -> None:
    ended = mira("config", "schema")
    assert ended.status == 0
    assert "training" in json.loads(ended.out)["properties"]


# generate and export


def test_generate(base: Path) -> None:
    shown = mira("generate", base / "run", "--client", "bob", "--max-new-tokens", "2")
    assert shown.status == 0, shown.err
    assert shown.out.count("input:    ") == shown.out.count("answer:   ") == shown.out.count("expected: ") == 2
    assert re.search(r"input:    \d and 1\n", shown.out)
    prompt = ["generate", base / "run", "--client", "bob", "--prompt", "3 and 4", "--max-new-tokens", "2"]
    assert mira(*prompt).status == 0
    assert mira(*prompt, "--instruction", "Say [b]x[/b].", "--round", "best").status == 0
    assert mira("generate", base / "run", "--client", "bop").error == "no client is named 'bop'; did you mean 'bob'?"


def test_answers_cannot_command_the_terminal(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mira.data.text.Encoder.answer", lambda encoder, tokens: "[red]:smile:[/red]\x1b]0;owned\x07é😀"
    )
    ended = mira("generate", base / "run", "--client", "bob", "--prompt", "x")
    assert ended.out == "[red]:smile:[/red]\\x1b]0;owned\\x07é😀\n"


def test_export_the_best_round_beside_the_last(base: Path) -> None:
    before = snapshot(base / "run" / "adapters")
    ended = mira("export", base / "run", "--all", "--round", "best")
    assert ended.status == 0, ended.err
    folders = [Path(line) for line in ended.out.splitlines()]
    assert [folder.name for folder in folders] == list(NAMES)
    assert {folder.parent for folder in folders} == {base / "run" / "adapters-best"}
    for folder in folders:
        best, last = (
            load_file(place / folder.name / "adapter_model.safetensors")
            for place in (base / "run" / "adapters-best", base / "run" / "adapters")
        )
        assert all(best[name].shape == last[name].shape for name in last)
        assert any(not torch.equal(best[name], last[name]) for name in last)
    assert snapshot(base / "run" / "adapters") == before


def test_export_while_another_process_writes_the_run(file: Path) -> None:
    from mira.store import Store

    folder = begin(load(file), file.parent / "run", rounds=1)
    with Store.open(folder):
        state = snapshot(folder)
        ended = mira("export", folder, "--client", "ann", "--client", "dan")
    assert ended.status == 0, ended.err
    assert ended.out == f"{folder}/adapters/ann\n{folder}/adapters/dan\n"
    written = snapshot(folder)
    assert {name.split("/")[0] for name in written.keys() - state.keys()} == {"adapters"}
    assert {name: written[name] for name in state} == state


def test_export_before_any_round(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: RunProgress, what: str) -> None:
        if what.startswith("measuring"):
            raise KeyboardInterrupt

    folder = file.parent / "run"
    with monkeypatch.context() as patched:
        patched.setattr(RunProgress, "stage", interrupted)
        assert mira("run", file, "--out", folder).status == 130
    for command in (["export", folder, "--all"], ["evaluate", folder], ["generate", folder, "--client", "ann"]):
        resume = f"mira run {folder} --resume (in Python: mira.resume)"
        assert mira(*command).error == f"{folder}: no round is committed yet; resume it with: {resume}"


def test_export_for_vllm(base: Path) -> None:
    line = mira("export", base / "run", "--all", "--format", "vllm").out.splitlines()[-1]
    assert line.startswith("vllm serve /")
    assert "--enable-lora --max-lora-rank 8 --lora-modules ann=/" in line
    assert line.count("=/") == len(NAMES)
    merged = mira("export", base / "run", "--client", "ann", "--merge", "--format", "vllm").out
    assert merged == f"vllm serve {base}/run/merged/ann\n"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_a_merged_model_is_a_whole_model(engine: str, file: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = file.parent / "run"
    assert mira("run", file, "--out", folder, "--set", f"engine.name={engine}").status == 0
    ended = mira("export", folder, "--client", "ann", "--merge")
    assert ended.out == f"{folder}/merged/ann\n"
    original = load_file(Path(load(file).model.name) / "model.safetensors")
    merged = load_file(folder / "merged" / "ann" / "model.safetensors")
    changed = {name for name in original if not torch.equal(original[name], merged[name])}
    assert set(merged) == set(original)
    assert len(changed) == 4
    assert all(re.search("[qv]_proj.weight", name) for name in changed)
    AutoModelForCausalLM.from_pretrained(folder / "merged" / "ann")


def test_what_looks_at_a_run_needs_its_weights_but_not_its_versions(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.tiny_models import save_tiny

    model = save_tiny(tmp_path / "model")
    file = write_config(tmp_path / "config.yaml", model, write_clients(tmp_path / "data.jsonl"))
    folder = begin(load(file), tmp_path / "run", rounds=1)
    with monkeypatch.context() as patched:
        patched.setattr("mira.setup.environment.version_of", lambda name: "99.0")
        ended = mira("export", folder, "--all")
        assert ended.status == 0
        assert "versions was" in ended.err
    save_tiny(model, seed=1)
    assert mira("export", folder, "--all").error.startswith('model was {"sha256"')
