"""Prompts as a user meets them: the template that is chosen and said, the day that is kept, examples that are too long."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path

import pytest
import yaml

import mira.setup.build
from helpers.sample_config import begin, settings, write_clients, write_config
from helpers.sample_config import mira as command
from helpers.tiny_models import CHAT_TEMPLATE, make_tiny, make_tokenizer
from mira import Experiment, resume, run
from mira import comparison as compare
from mira.config import load
from mira.core.errors import UserError

DATED = "<start>system\n{{ strftime_now('%d %b %Y') }}<eos>\n" + CHAT_TEMPLATE


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    make_tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def on(day: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Day(datetime.date):
        @classmethod
        def today(cls) -> Day:
            return cls(2026, 1, day)

    monkeypatch.setattr(mira.setup.build, "Date", Day)
    monkeypatch.setattr("mira.comparison.run.date", Day)


def test_a_run_keeps_the_day_that_its_template_writes(
    dated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment(**settings(dated, write_clients(tmp_path / "data.jsonl"), prompt={"template": "auto"}))
    on(1, monkeypatch)
    whole = run(experiment, tmp_path / "whole")
    begin(experiment, tmp_path / "cut", 1)
    assert yaml.safe_load((tmp_path / "cut" / "config.yaml").read_text())["prompt"]["date"] == "2026-01-01"
    on(22, monkeypatch)
    resumed = resume(tmp_path / "cut")
    later = run(experiment, tmp_path / "later")
    same = ("clients", "local_loss", "local_loss_start")
    assert [[c["loss"] for c in resumed["clients"]], *(resumed[k] for k in same[1:])] == [
        [c["loss"] for c in whole["clients"]], *(whole[k] for k in same[1:])
    ]  # fmt: skip
    assert later["local_loss_start"] != whole["local_loss_start"]
    assert command("evaluate", tmp_path / "whole").status == 0


def test_the_template_is_chosen_by_the_tokenizer_and_said(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_clients(tmp_path / "data.jsonl")
    with caplog.at_level(logging.INFO, "mira"):
        result = run(Experiment(**settings(tiny_folder, data, prompt={"template": "auto"}, rounds=1)), tmp_path / "run")
    assert "prompts: chat (the tokenizer's template), answers end with <eos>" in caplog.messages
    assert result["template"] == "chat"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["prompt"]["template"] == "chat"
    assert "chat prompts" in command("run", tmp_path / "run", "--resume").out


def test_a_template_file_is_kept_in_the_run_folder(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHAT_TEMPLATE.replace("<start>assistant\n{%", "<start>assistant\n> {%"))
    values = settings(tiny_folder, write_clients(tmp_path / "data.jsonl"), prompt={"template": "auto"}, rounds=1)
    values["prompt"]["template_file"] = str(file)
    run(Experiment(**values), tmp_path / "run")
    file.unlink()
    assert load(tmp_path / "run" / "config.yaml").prompt.chat_template is not None
    assert command("evaluate", tmp_path / "run").status == 0
    with pytest.raises(UserError, match=r"prompt\.template_file='.*own\.jinja': no such file"):
        run(Experiment(**values), tmp_path / "other")


def test_examples_too_long_are_cut_left_out_or_refused(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        lines = [{"instruction": f"Echo {n} " + "again " * (30 if n == 3 else 0), "output": str(n)} for n in range(9)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def config(overlong: str) -> Path:
        prompt = {"template": "plain", "max_length": 60, "overlong": overlong}
        sizes = {"train": 5, "validation": 2, "test": 2}
        return write_config(tmp_path / "c.yaml", tiny_folder, data, prompt=prompt, split=sizes, rounds=1,
                            data={"client_column": None, "group_column": None}, graph={"name": "complete"})  # fmt: skip

    for overlong in ("error", "cut"):  # there is no input to cut
        said = command("run", config(overlong), "--out", tmp_path / overlong).error
        assert "a.jsonl:4 (client 'a')" in said
        assert "prompt.overlong=drop" in said
    ended = command("run", config("drop"), "--out", tmp_path / "drop")
    assert ended.status == 0, ended.err
    assert "examples of more than 60 tokens left out: a (1), b (1)" in ended.err


def test_the_first_example_may_be_too_long_and_is_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        lines = [{"instruction": f"Echo {n} " + "again " * (30 * (n < 6)), "output": str(n)} for n in range(40)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = write_config(
        tmp_path / "c.yaml", tiny_folder, data, prompt={"template": "chat", "max_length": 90, "overlong": "drop"},
        split={"train": 20, "validation": 10, "test": 10}, rounds=1, data={"client_column": None, "group_column": None},
        graph={"name": "complete"},
    )  # fmt: skip
    assert command("config", "check", config).status == 0
    assert command("run", config, "--out", tmp_path / "run").status == 0


def test_what_a_template_was_given_goes_with_the_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    mood = CHAT_TEMPLATE.replace("<start>assistant\n{%", "<start>assistant\n{{ mood }}{%")
    values = settings(tiny_folder, write_clients(tmp_path / "data.jsonl"), prompt={"template": "auto"}, rounds=1)
    values["prompt"] |= {"chat_template": mood, "template_kwargs": {"mood": "calm", "thinking": False, "nothing": None}}
    run(Experiment(**values), tmp_path / "run")
    folder = tmp_path / "run" / "adapters" / "ann"
    template = (folder / "chat_template.jinja").read_text()
    assert template.startswith('{% set mood = "calm" %}{% set thinking = false %}{% set nothing = none %}')
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<start>assistant\ncalm")
    assert '"mood": "calm"' in (folder / "README.md").read_text()
    for server in ("vllm", "sglang"):
        assert "--chat-template " in command("export", tmp_path / "run", "--all", "--format", server).out


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            {"template_kwargs": {"tokenize": True}},
            r"prompt\.template_kwargs\.tokenize: is an argument of apply_chat_template",
        ),
        ({"date": "2026-02-30"}, r"prompt\.date=2026-02-30: there is no such day"),
    ],
)
def test_what_no_template_can_be_given_is_refused(prompt: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Experiment(**settings(Path("m"), Path("d"), prompt=prompt))


def test_a_client_of_raw_prompts_has_no_template(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        lines = [{"prompt": f"{n} and 1 make ", "completion": str(n + 1)} for n in range(8)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = write_config(
        tmp_path / "c.yaml", tiny_folder, data, rounds=1, data={"client_column": None, "group_column": None},
        graph={"name": "complete"},
    )  # fmt: skip
    assert command("run", config, "--out", tmp_path / "run").status == 0
    assert {file.name for file in (tmp_path / "run" / "adapters" / "a").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "base_model.json",
    }  # fmt: skip
    assert "continued as it stands" in (tmp_path / "run" / "adapters" / "a" / "README.md").read_text()
    for option in ("--system", "--instruction"):
        said = command("generate", tmp_path / "run", "--client", "a", "--prompt", "1", option, "Sing.").error
        assert said == f"{option}: the prompts of 'a' are completed without a template; put it into --prompt"


def test_runs_of_a_comparison_share_the_day(dated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_config(
        tmp_path / "base.yaml", dated, write_clients(tmp_path / "data.jsonl"), rounds=1, prompt={"template": "auto"}
    )
    plan = tmp_path / "compare.yaml"
    plan.write_text(
        json.dumps(
            {"base": str(base), "seeds": [0], "entries": {"a": {"method.name": "local"}, "b": {"method.name": "fedit"}}}
        )
    )
    on(1, monkeypatch)
    loaded = compare.load(plan)
    compare.compare(loaded, tmp_path / "out", "")
    days = [yaml.safe_load(file.read_text())["prompt"]["date"] for file in (tmp_path / "out").rglob("config.yaml")]
    assert days == ["2026-01-01"] * 2
    on(2, monkeypatch)
    more = json.loads(plan.read_text())
    more["entries"]["c"] = {"method.name": "mira"}
    plan.write_text(json.dumps(more))
    compare.compare(compare.load(plan), tmp_path / "out", "")
    days = [yaml.safe_load(file.read_text())["prompt"]["date"] for file in (tmp_path / "out").rglob("config.yaml")]
    assert days == ["2026-01-01"] * 3
