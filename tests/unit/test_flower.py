"""The content of Flower's messages, and what the app on the server makes of odd ones."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from mira.fleet.flower import apps as flower
from mira.fleet.flower import contents, frames
from mira.fleet.flower.contents import content_of, record_of

NOT_OURS = "its message is none of mira's; install the same version of mira-fl at server and site"


def message_of(content: RecordDict) -> Message:
    about = Metadata(
        run_id=1, message_id="", src_node_id=2, dst_node_id=1, reply_to_message_id="q", group_id="", created_at=1.0, ttl=60.0,
        message_type="query",
    )  # fmt: skip
    return Message(metadata=about, content=content)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("size", "objects"), [(0, 3), (contents.SHORT, 3), (contents.SHORT + 1, 5)])
def test_a_content_travels_in_few_objects(size: int, objects: int) -> None:
    """Each object is a request at each of four hops."""
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with no_object_id_recompute():
        message = message_of(record_of(data))
        sent = {id: part.deflate() for id, part in get_all_nested_objects(message).items()}
        assert len(sent) == objects
        back = inflate_object_from_contents(message.object_id, sent)
    assert isinstance(back, Message)
    assert content_of(back) == data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (record_of(b"an answer"), b"an answer"),
        (RecordDict(), NOT_OURS),
        (RecordDict({"mira": ConfigRecord()}), NOT_OURS),
        (RecordDict({"mira": ArrayRecord({})}), NOT_OURS),
        (RecordDict({"mira": ConfigRecord({"0": "text"})}), NOT_OURS),
        (record_of(b"one that is too long"), "its reply has 20 bytes; at most 10 are read"),
    ],
    ids=["ours", "empty", "another-record", "no-array", "text", "too-long"],
)
def test_one_site_s_odd_reply_does_not_end_the_app_of_all(
    monkeypatch: pytest.MonkeyPatch, content: RecordDict, told: bytes | str
) -> None:
    monkeypatch.setattr(frames, "LIMIT", 10)
    assert flower._opened(message_of(content)) == told


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
