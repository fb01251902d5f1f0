from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mira.core.errors import UserError
from mira.data import SOURCES
from mira.data.federation import SplitSizes, make_federation
from mira.data.partition import ByChance, ByColumn
from mira.data.sources.builtin import TASKS, Builtin
from mira.data.sources.dolly import Dolly
from mira.data.sources.hub import HubDataset
from mira.data.sources.jsonl import Jsonl
from mira.data.sources.natural_instructions import NaturalInstructions
from mira.data.types import Example, Message, client_data

SAY = {"instruction": "Say it.", "input": "7", "output": "seven"}


def write(path: Path, *records: Any) -> Path:
    """One line each; text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_every_source_names_itself() -> None:
    for name, source in SOURCES.items():
        assert source.__dataclass_fields__["source"].default == name  # type: ignore[attr-defined]


# builtin


def test_builtin_is_the_same_for_a_seed_and_other_for_another() -> None:
    assert Builtin().load(3) == Builtin().load(3)
    assert Builtin().load(3)[0].examples != Builtin().load(4)[0].examples


def test_builtin_has_three_tasks_in_each_of_four_families() -> None:
    clients = Builtin(examples=10).load(0)
    assert [c.name for c in clients] == [task.name for task in TASKS]
    families = [c.group for c in clients]
    assert {f: families.count(f) for f in families} == {"units": 3, "dates": 3, "tags": 3, "records": 3}
    assert all(c.description == e.instruction for c in clients for e in c.examples)


def test_builtin_never_repeats_a_question() -> None:
    for client in Builtin(examples=500).load(0):
        assert len({e.key for e in client.examples}) == 500


def test_builtin_answers_are_right() -> None:
    months = "JanFebMarAprMayJunJulAugSepOctNovDec"
    for client in Builtin(examples=200).load(1):
        for e in client.examples:
            if client.group == "units":
                amount, unit = e.output.split("|")
                assert int(e.input.split()[0]) * 1000 == int(amount)
                assert unit == {"units-length": "m", "units-mass": "g", "units-volume": "ml"}[client.name]
            elif client.group == "dates":
                year, month, day = e.output.split(".")
                assert len(month) == len(day) == 2
                assert {str(int(day)), year} < set(e.input.replace("-", " ").replace(",", "").split())
                assert months[3 * int(month) - 3 :][:3] in e.input
            elif client.group == "tags":
                words = e.input.lower().split()
                kept = {"tags-all": words, "tags-ends": [words[0], words[2]], "tags-tail": words[1:]}[client.name]
                assert e.output == f"[{'-'.join(kept)}]"
            else:
                city, count, goods, name = e.output.replace(":", "").replace("(", "").replace(")", "").split()
                assert all(part in e.input for part in (city, count, goods, name))


@pytest.mark.parametrize("examples", [0, 501])
def test_builtin_says_how_many_examples_it_can_make(examples: int) -> None:
    with pytest.raises(ValidationError, match="examples"):
        Builtin(examples=examples)


# jsonl


def test_jsonl_folder_is_one_client_per_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "bo.jsonl", SAY, "", {"instruction": "Sing.", "output": "la", "place": 3})
    write(tmp_path / "al.jsonl", {"prompt": "Sing.", "completion": "la"})
    (tmp_path / "notes.txt").write_text("not data")
    with caplog.at_level(logging.WARNING):
        al, bo = Jsonl(tmp_path).load(0)
    *files, fields = caplog.messages
    assert [line.partition(" (data files")[0] for line in files] == [f"{tmp_path}: not read: notes.txt"]
    assert fields == "unused fields: 'place' (in 1 of 3 examples)"
    assert (al.name, al.task, al.group, al.description) == ("al", "al", "", "Sing.")
    assert al.examples == (Example("Sing.", "", "la", raw=True),)
    assert [example.place for example in bo.examples] == [f"{tmp_path}/bo.jsonl:1", f"{tmp_path}/bo.jsonl:3"]
    assert bo.examples == (Example("Say it.", "7", "seven"), Example("Sing.", "", "la"))


def test_jsonl_file_is_cut_by_its_client_column(tmp_path: Path) -> None:
    rows = [{**SAY, "who": who, "team": team} for who, team in [("b", "x"), (3, "y"), ("b", "x")]]
    clients = Jsonl(write(tmp_path / "all.jsonl", *rows), client_column="who", group_column="team").load(0)
    assert [(c.name, c.group, len(c.examples)) for c in clients] == [("3", "y", 1), ("b", "x", 2)]


def test_jsonl_reads_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (client,) = Jsonl(write(tmp_path / "d/a.jsonl", {"messages": turns}).parent).load(0)
    assert client.examples == (Example("", "", "4", (Message("user", "2+2?"), Message("assistant", "4"))),)


def test_jsonl_survives_a_byte_order_mark_windows_line_ends_and_odd_separators(tmp_path: Path) -> None:
    text = json.dumps({**SAY, "input": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n" + text.encode())
    assert [e.input for e in Jsonl(tmp_path).load(0)[0].examples] == ["a\u2028b\x85c"] * 2


def user(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BAD_LINES: list[tuple[Any, str]] = [
    ('{"instruction": "x"', r"malformed JSON .*Expecting.* column 20"),
    ("[" * 100_000, "malformed JSON"),
    ('{"instruction": ' + "9" * 5000 + "}", "malformed JSON"),
    ("[1]", "one JSON object, got list"),
    (
        {"instruction": "x", "input": "y"},
        r"no field 'output' \(found: input, instruction\); needed: instruction \+ output",
    ),
    ({"input": "y", "output": "z"}, "no field 'instruction'"),
    ({"text": "y"}, "field 'text' is free text.*its beginning as 'prompt', the rest as 'completion'"),
    ({"prompt": "y"}, "no field 'completion'"),
    ({"completion": "y"}, "no field 'prompt'"),
    ({**SAY, "output": " \n"}, "field 'output' is empty.*needs a response"),
    ({**SAY, "output": {"a": 7}}, "field 'output' must be text, got dict"),
    ({**SAY, "output": None}, "field 'output' is null; fill it in"),
    ({"instruction": None, "output": "x"}, "field 'instruction' is null; fill it in"),
    ('{"instruction": "x", "output": "1", "output": "2"}', "key 'output' is given twice; remove one"),
    ('{"instruction": "x", "output": Infinity}', "Infinity is no number of JSON"),
    ('{"instruction": "x", "output": "y"} {}', "more text after its end"),
    ({**SAY, "Output": "x"}, "has 'output' and 'Output'; remove one"),
    ({**SAY, "prompt": "x", "completion": "y"}, r"has prompt \+ completion and instruction \+ input \+ output"),
    ({**SAY, "messages": [{"role": "user", "content": "x"}]}, r"has messages and instruction"),
    ({**SAY, "response": "x"}, "has two answers, 'output' and 'response'; remove one"),
    ({**SAY, "question": "x"}, "has two questions, 'instruction' and 'question'; remove one"),
    ({**SAY, "context": "x"}, "has two inputs, 'input' and 'context'; remove one"),
    ({**SAY, "history": [["q"]]}, r"history\[0\] must be a pair"),
    ({**SAY, "history": "[["}, "field 'history' is text that is not JSON"),
    ({**SAY, "input": ["7"]}, "field 'input' must be text, got list"),
    ({**SAY, "input": "\ud800"}, "field 'input' holds half a character"),
    ({"prompt": "x", "completion": ""}, "field 'completion' is empty"),
    ({"messages": "hi"}, "field 'messages' is text that is not JSON"),
    ({"messages": []}, "field 'messages' must be a list"),
    ({"messages": "[]"}, "field 'messages' must be a list"),
    ({"messages": ["hi"]}, "field 'messages' must be a list"),
    (user(("user", "hi")), "end with an assistant turn"),
    (user(("assistant", "hi")), "start with a system or user turn"),
    (
        user(("user", "hi"), ("robot", "ho")),
        r"messages\[1\]: role 'robot' is unknown; allowed: system, user, assistant",
    ),
    (user(("user", "hi"), ("assistant", " ")), r"messages\[1\]: field 'content' is empty"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: no field 'content'"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_in_one_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", SAY, "", line)
    with pytest.raises(UserError, match=message) as caught:
        Jsonl(tmp_path).load(0)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_a_byte_that_is_not_utf8_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(SAY).encode() + b'\n{"instruction": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not UTF-8 \(byte 0xe9\); save"):
        Jsonl(tmp_path).load(0)


def test_a_path_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {**SAY, "team": "x"}, {**SAY, "team": "y"})
    empty = tmp_path / "empty"
    empty.mkdir()
    odd = tmp_path / "odd"
    (odd / "b.jsonl").mkdir(parents=True)
    cases: list[tuple[Jsonl, str]] = [
        (Jsonl(tmp_path / "nowhere"), r"data\.path='.*nowhere': no such file"),
        (Jsonl(empty), r"no data file in this folder"),
        (Jsonl(file), r"data\.client_column: missing"),
        (Jsonl(tmp_path, client_column="who"), r"data\.client_column: .* is a folder"),
        (Jsonl(odd), r"no data file in this folder"),
        (Jsonl(file, client_column="who"), r"a\.jsonl:1: no field 'who'"),
        (Jsonl(tmp_path, group_column="team"), r"a\.jsonl:2: client 'a' is in group 'y' here and in 'x' above"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message):
            source.load(0)


def test_an_empty_client_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r":1: field 'who' is empty"):
        Jsonl(write(tmp_path / "a.jsonl", {**SAY, "who": " "}), client_column="who").load(0)


def test_a_client_file_without_examples_has_too_few(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "")
    with pytest.raises(UserError, match="client 'a' has 0 different examples"):
        make_federation(Jsonl(tmp_path), SplitSizes(1, 1, 1), 0)


# dolly and the hub


def test_dolly_reads_its_file_by_category(tmp_path: Path) -> None:
    row = {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "closed_qa"}
    path = write(tmp_path / "dolly.jsonl", row, {**row, "context": "", "category": "open_qa"})
    closed, opened = Dolly(path).load(0)
    assert (closed.name, closed.group, closed.examples) == (
        "closed_qa",
        "closed_qa",
        (Example("Who?", "Ann came.", "Ann"),),
    )
    assert opened.examples == (Example("Who?", "", "Ann"),)
    with pytest.raises(UserError, match=r"bad\.jsonl:1: no column 'context' for 'input'"):
        Dolly(write(tmp_path / "bad.jsonl", SAY)).load(0)


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    monkeypatch.setattr(datasets, "load_dataset", load)


def test_hub_maps_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        return [{"prompt": "noise", "q": "Who?", "a": name, "kind": name} for name in ("Ann", "Bob")]

    hub(monkeypatch, load)
    source = HubDataset("some/data", ByColumn("a"), {"instruction": "q", "output": "a", "input": "kind"}, revision="v1")
    assert [c.examples for c in source.load(0)] == [(Example("Who?", n, n),) for n in ("Ann", "Bob")]
    assert asked == [(("some/data", None), {"split": "train", "revision": "v1"})]


def test_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    hub(monkeypatch, load)
    with pytest.raises(UserError, match=r"'some/data' cannot be loaded from the hub \(Couldn't reach the hub\)"):
        HubDataset("some/data", ByChance(2)).load(0)


# natural-instructions


def task(count: int = 25, **changes: Any) -> dict[str, Any]:
    instances = [{"id": str(n), "input": f"question {n}", "output": [str(n), "or so"]} for n in range(count)]
    return {"Definition": ["Answer.", "Other."], "Categories": ["Talk", "Else"], "Instances": instances} | changes


def test_natural_instructions_takes_first_definition_output_and_category(tmp_path: Path) -> None:
    write(tmp_path / "tasks/task1_x.json", task())
    for path in (tmp_path, tmp_path / "tasks"):
        (client,) = NaturalInstructions(path).load(0)
        assert (client.name, client.task, client.group, client.description) == ("task1_x", "task1_x", "Talk", "Answer.")
        assert client.examples[3] == Example("Answer.", "question 3", "3")
        assert len(client.examples) == 25


def test_natural_instructions_leaves_long_inputs_and_small_tasks_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"id": "l", "input": "x" * 1024, "output": ["y"]}, {"id": "s", "input": "x" * 1023, "output": ["y"]}]
    write(tmp_path / "a.json", task(19))
    write(tmp_path / "b.json", task(20))
    write(tmp_path / "c.json", task(Instances=task(20)["Instances"] + long))
    write(tmp_path / "d.json", task(30))
    with caplog.at_level(logging.WARNING):
        clients = NaturalInstructions(tmp_path, clients=2).load(0)
    assert [(c.name, len(c.examples)) for c in clients] == [("b", 20), ("c", 21)]
    assert caplog.messages == ["left out a: 19 instances with inputs below 1024 characters, not 20"]


def test_natural_instructions_draws_a_share_by_seed(tmp_path: Path) -> None:
    write(tmp_path / "a.json", task(50))
    one, same, other = (NaturalInstructions(tmp_path, share=0.2).load(seed)[0].examples for seed in (0, 0, 1))
    assert len(one) == 10
    assert one == same != other


def test_natural_instructions_names_what_it_cannot_give(tmp_path: Path) -> None:
    write(tmp_path / "task1_talk.json", task())
    write(tmp_path / "task2_small.json", task(3))
    cases: list[tuple[NaturalInstructions, str]] = [
        (NaturalInstructions(tmp_path, clients=2), r"data\.clients=2: .* holds 1 usable tasks"),
        (NaturalInstructions(tmp_path, tasks=("task1_tlak",)), "no task 'task1_tlak'.*did you mean 'task1_talk'"),
        (NaturalInstructions(tmp_path, tasks=("task2_small",)), "'task2_small' has 3 instances"),
        (NaturalInstructions(tmp_path / "none"), r"data\.path=.*no such file or folder"),
        (NaturalInstructions(tmp_path / "task1_talk.json"), r"no task files \(\*\.json\)"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message):
            source.load(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"Definition": [}', r"a\.json:2: malformed JSON"),
        ([1], "no field 'Definition'"),
        ({"Definition": ["x"]}, "no field 'Categories'"),
        (task(Definition="x"), "field 'Definition' must be a list"),
        (task(Definition=[]), "field 'Definition' must be a list"),
        (task(Definition=[["x"]]), "field 'Definition' must be text, got list"),
        (task(Instances={}), "field 'Instances' must be a list"),
        (task(Instances=["x"]), r"Instances\[0\]: no field 'output'"),
        (task(Instances=[{"input": "x", "output": [""]}]), r"Instances\[0\]: field 'output' is empty"),
        (task(Instances=[{"output": ["x"]}]), r"Instances\[0\]: no field 'input'"),
    ],
)
def test_natural_instructions_names_the_bad_field(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=message) as caught:
        NaturalInstructions(tmp_path).load(0)
    assert str(tmp_path / "a.json") in str(caught.value)


def test_the_real_natural_instructions() -> None:
    beside = Path(__file__).parents[3] / "shared/data/natural-instructions"
    path = Path(os.environ.get("MIRA_NI_DATA", beside))
    if not path.is_dir():
        pytest.skip("no Natural Instructions tasks: set MIRA_NI_DATA to the folder that holds them")
    federation = make_federation(NaturalInstructions(path, clients=12), SplitSizes(24, 16, 32), 0)
    assert len(federation.clients) == 12
    assert all(c.group and c.slug == c.name and len(c.test) == 32 for c in federation.clients)


def test_only_an_instruction_that_all_examples_share_describes_a_client() -> None:
    same, other = Example("translate", "a", "b"), Example("say it", "", "c")
    assert client_data("x", [same, same]).description == "translate"
    assert client_data("x", [same, other]).description == ""
    assert client_data("x", []).description == ""
