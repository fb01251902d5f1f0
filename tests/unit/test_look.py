"""mira data look, and what mira config check finds in prompts: both without weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from rich.cells import cell_len

from helpers.sample_config import mira, settings, write_clients, write_config
from mira.core.errors import UserError
from mira.model.reader import open_reader

TALK = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Ho"}]


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clients: conversations; and pairs, one of them asked twice and one shared with nobody."""
    write(
        tmp_path / "data/a.jsonl",
        *({"messages": [{**TALK[0], "content": f"Hi {n}"}, TALK[1]], "id": n} for n in range(3)),
    )
    pairs = [{"messages": [TALK[0], TALK[1]]}, {"messages": [TALK[0], {**TALK[1], "content": "No"}]}]
    write(tmp_path / "data/b.jsonl", *pairs, pairs[0])
    return tmp_path / "data"


def test_without_a_model_what_is_recognised(folder: Path) -> None:
    ended = mira("data", "look", folder)
    assert ended.status == 0, ended
    assert "messages (6)" in ended.out
    assert "not used  id (3)" in ended.out
    assert "3 repeat a question" not in ended.out
    assert "2 clients, 6 examples, 2 repeat a question of their client (1 with" in ended.out
    assert "--model NAME" in ended.out


def test_with_a_model_lengths_and_what_is_learned(folder: Path, tiny_folder: Path) -> None:
    ended = mira(
        "data", "look", folder, "--model", tiny_folder, "--set", "prompt.template=chat", "--set", "prompt.max_length=30"
    )
    assert ended.status == 0, ended
    lines = ended.out.splitlines()
    assert all(cell_len(line) <= 80 for line in lines)
    learned = [line for line in lines if line.startswith("* ")]
    assert learned[0].startswith("* Ho<eos>")
    assert "  <start>user\\n" in lines


def test_the_same_as_one_json_object(folder: Path, tiny_folder: Path) -> None:
    ended = mira("data", "look", folder, "--model", tiny_folder, "--set", "prompt.template=chat", "--json")
    found = json.loads(ended.out)
    assert found["layouts"] == {"messages": 6}
    assert found["unused"] == {"id": 3}
    assert found["shared"] == 0
    a, b = found["clients"]
    # A token a character, <start> and <eos> one each: "<start>user\nHi 0<eos>\n<start>assistant\nHo<eos>" and what may follow.
    assert a["tokens_mean"] == a["tokens_longest"]
    assert 26 <= a["tokens_longest"] <= 27
    assert (b["examples"], b["repeats"], b["other_answers"], b["over"]) == (3, 2, 1, 0)
    assert b["longest"] == f"{folder}/b.jsonl:1"
    text = "".join(part["text"] for part in found["first"]["parts"])
    assert text.startswith("<start>user\nHi 0<eos>\n<start>assistant\nHo<eos>")
    assert next(part["text"] for part in found["first"]["parts"] if part["learned"]).startswith("Ho<eos>")


def test_what_the_chat_template_does_not_read_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    called = {"role": "assistant", "content": "", "tool_calls": [tool]}
    record = {"messages": [TALK[0], called, {"role": "tool", "content": "sunny"}, TALK[1]], "tools": [tool]}
    file = write(tmp_path / "a.jsonl", record)
    assert (
        "left out  by the chat template: tool_calls (1), tools (1)"
        in mira("data", "look", file, "--model", tiny_folder).out
    )


def test_wide_letters_stay_within_the_columns(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / f"{'病院' * 20}.jsonl", {"instruction": "質問" * 100, "output": "答え"})
    ended = mira("data", "look", tmp_path / "data", "--model", tiny_folder)
    assert ended.status == 0
    assert all(cell_len(line) <= 80 for line in ended.out.splitlines())


def test_one_file_and_a_configuration(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_clients(tmp_path / "data.jsonl")
    assert "1 clients, 32 examples" in mira("data", "look", file).out
    config = write_config(tmp_path / "config.yaml", tiny_folder, file)
    assert "4 clients, 32 examples" in mira("data", "look", config).out
    builtin = ("--set", "data={source: builtin, examples: 3}")
    assert "12 clients, 36 examples" in mira("data", "look", config, *builtin).out


def test_what_cannot_be_looked_at_is_one_line(tmp_path: Path) -> None:
    assert "no such file or folder" in mira("data", "look", tmp_path / "absent").error
    (tmp_path / "empty").mkdir()
    assert "no data file in this folder" in mira("data", "look", tmp_path / "empty").error
    (tmp_path / "empty" / "a.jsonl").write_text("")
    assert "has no examples" in mira("data", "look", tmp_path / "empty").error


def test_check_refuses_what_run_refuses(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    sizes = {"train": 1, "validation": 1, "test": 1, "answers": "all"}
    for file in folder.glob("*.jsonl"):
        write(file, *({"messages": [{**TALK[0], "content": f"Hi {n}"}, TALK[1]]} for n in range(3)))
    data = {"source": "jsonl", "path": str(folder)}
    values = settings(tiny_folder, folder) | {"data": data, "split": sizes, "graph": {"name": "complete"}}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    for wrong in (["prompt.template=alpaca"], ["prompt.template=chat", "prompt.max_length=4"]):
        arguments = [config, *(part for each in wrong for part in ("--set", each))]
        checked = mira("config", "check", *arguments).error
        assert checked == mira("run", *arguments, "--out", tmp_path / "run").error
        assert not (tmp_path / "run").exists()
    assert mira("config", "check", config, "--set", "prompt.template=chat").status == 0


def test_check_says_where_the_model_is_not_there(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_folder, write_clients(tmp_path / "data.jsonl"))
    ended = mira("config", "check", config, "--set", "model.name=nobody/nothing")
    assert ended.status == 0
    assert "prompts not checked: nobody/nothing is not on this machine yet" in ended.out
    assert "no such folder" in mira("config", "check", config, "--set", "model.name=./nothing").error


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        open_reader(str(tmp_path))


def test_home_is_expanded_everywhere(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = write_clients(tmp_path / "data.jsonl")
    (tmp_path / "graph.csv").write_text("source,target,weight\nann,bob,1\n")
    config = write_config(
        tmp_path / "config.yaml", tiny_folder, Path("~") / data.name, graph={"name": "file", "path": "~/graph.csv"}
    )
    with caplog.at_level(logging.ERROR):
        assert mira("config", "check", config).status == 0
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    template = ("--set", "prompt.template=chat", "--set", "prompt.template_file=~/own.jinja")
    assert mira("config", "check", config, *template).status == 0
    refused = mira("config", "check", config, "--set", "data.path=~nobody-here/data.jsonl").error
    assert "there is no home folder of that name" in refused
