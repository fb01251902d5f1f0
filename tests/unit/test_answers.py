"""What passes as a site's own answer: nothing that Flower would take for somebody else's, or for an instruction."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse, Reconnect
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from mira.fleet.gate.push_request import own_answer, parts_wanted

MINE, THEIRS = 2**64 - 5, 7


def pushed(sender: int = MINE, question: str = "ab" * 32, pusher: int = MINE, messages: int = 1) -> bytes:
    about = Metadata(
        run_id=3, message_id="cd" * 32, src_node_id=sender, dst_node_id=1, reply_to_message_id=question, ttl=9.5
    )
    request = PushMessagesRequest(node=Node(node_id=pusher), messages_list=[Message(metadata=about)] * messages)
    request.clientapp_runtime_list.append(0.5)
    return bytes(request.SerializeToString())


def test_an_answer_of_ones_own_passes() -> None:
    assert own_answer(pushed()) == "ab" * 32


@pytest.mark.parametrize(
    "body",
    [
        b"", pushed(sender=THEIRS), pushed(pusher=THEIRS), pushed(sender=1, question=""), pushed(question=""),
        pushed(question="a" * 129),
        pushed(sender=0, pusher=0),
        pushed(messages=0), pushed(messages=2), pushed() + pushed(), pushed() + pushed(sender=THEIRS, messages=0),
        pushed()[:-3], pushed() + b"\x0b\x0c", pushed() + b"\x12", pushed() + b"\x80" * 11, pushed() + b"\x00\x00",
        b"\x08\x05" + pushed(), pushed().replace(b"\x18", b"\x1a", 1),
    ],
)  # fmt: skip
def test_anything_else_does_not(body: bytes) -> None:
    assert own_answer(body) is None


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4), st.binary(max_size=12))
def test_what_passes_is_read_the_same_by_flower(changes: list[tuple[int, int]], end: bytes) -> None:
    body = bytearray(pushed() + end)
    for place, byte in changes:
        body[place % len(body)] = byte
    if (question := own_answer(bytes(body))) is None:
        return
    try:
        read = PushMessagesRequest.FromString(bytes(body))
    except DecodeError:
        return  # nor does Flower take it
    [message] = read.messages_list
    assert message.metadata.src_node_id == read.node.node_id
    assert message.metadata.reply_to_message_id == question


@pytest.mark.parametrize("parts", [0, 1, 40])
def test_the_parts_that_a_superlink_lacks_are_counted(parts: int) -> None:
    told = PushMessagesResponse(
        reconnect=Reconnect(reconnect=5), results={"cd" * 32: 0}, objects_to_push=[f"{n:064x}" for n in range(parts)],
        session_id="s",
    )  # fmt: skip
    assert parts_wanted(told.SerializeToString()) == parts
    for other in (b"", b"\x0b"):
        assert parts_wanted(other) is None
