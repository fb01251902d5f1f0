"""What a site's app raises: Flower sends its text to the server, so it says nothing of the site."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, RecordDict

from mira.fleet.flower import apps as flower
from mira.fleet.flower import frames


@pytest.mark.parametrize("odd", [False, True], ids=["nobody-listens", "another-error"])
def test_a_worker_that_does_not_answer_is_told_without_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: bool
) -> None:
    monkeypatch.setattr(flower, "_WORKER", 0.0)
    monkeypatch.setattr(flower, "_end_with_parent", lambda: None)  # it would end this process
    path = tmp_path / "worker"
    if odd:
        monkeypatch.setattr(frames, "connect", lambda path, patience: Path(path, "sub").read_bytes())
    context = Context(1, 2, {"worker": str(path)}, RecordDict(), {})
    about = Metadata(
        run_id=1, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="", group_id="", created_at=1.0, ttl=60.0,
        message_type="query",
    )  # fmt: skip
    with pytest.raises(flower.Unanswered) as raised:
        flower.client_app(Message(metadata=about, content=flower._content(b"a question")), context)  # type: ignore[call-overload]
    assert str(path) in str(raised.value.__cause__), "its log says it"
    assert str(raised.value) == "the site's worker did not answer"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (flower._content(b"an answer"), b"an answer"),
        (RecordDict(), "its message is none of mira's"),
        (RecordDict({"mira": ConfigRecord()}), "its message is none of mira's"),
        (RecordDict({"mira": ArrayRecord({})}), "its message is none of mira's"),
        (flower._content(b"one that is too long"), "its reply has 20 bytes; at most 10 are read"),
    ],
    ids=["ours", "empty", "another-record", "no-array", "too-long"],
)
def test_one_site_s_odd_reply_does_not_end_the_app_of_all(
    monkeypatch: pytest.MonkeyPatch, content: RecordDict, told: bytes | str
) -> None:
    monkeypatch.setattr(frames, "LIMIT", 10)
    about = Metadata(
        run_id=1, message_id="", src_node_id=2, dst_node_id=1, reply_to_message_id="q", group_id="", created_at=1.0, ttl=60.0,
        message_type="query",
    )  # fmt: skip
    assert flower._opened(Message(metadata=about, content=content)) == told  # type: ignore[call-overload]


def test_a_reply_that_does_not_inflate_is_said_to_be_such() -> None:
    told = flower._opened(ValueError("/home/ann/patients"))
    assert told == "its reply cannot be read (ValueError)"


def test_the_server_does_not_repeat_what_a_site_says_of_an_error() -> None:
    assert flower._why(Error(2, "/home/ann/patients")) == "no answer from the site's worker (Flower's error 2)"


@pytest.mark.parametrize("name", ["server_app", "client_app"])
def test_flower_finds_the_apps_under_their_address(name: str) -> None:
    from flwr.supercore.object_ref import load_app, validate

    found, reason = validate(f"mira.fleet.flower:{name}")
    assert found, reason
    assert load_app(f"mira.fleet.flower:{name}", ValueError) is not None
