"""Hostile and broken replies: each is rejected for its own reason, and the others are not touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mira.fleet.messages.packet import Head, Packet, pack
from mira.fleet.messages.validate import Expected, Rejection, distance, too_far, validate

HEAD = Head("train", "0" * 16, "a1", 3, "hospital-1")
EXPECTED = Expected(HEAD, {"row0": ((4,), torch.float32)})
GOOD = Packet(HEAD, {"jobs": []}, {"row0": torch.ones(4)})


def kind(data: bytes) -> str:
    found = validate(EXPECTED, data)
    assert isinstance(found, Rejection)
    assert "\n" not in found.reason
    assert len(found.reason) < 400
    return found.kind


def test_what_was_asked_is_accepted() -> None:
    found = validate(EXPECTED, pack(GOOD))
    assert isinstance(found, Packet)
    assert found.head == HEAD
    assert torch.equal(found.tensors["row0"], torch.ones(4))


def headed(**changes: object) -> Packet:
    return replace(GOOD, head=replace(HEAD, **changes))


def sent(**tensors: torch.Tensor) -> Packet:
    return replace(GOOD, tensors=tensors)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (headed(name="hospital-2"), "foreign"),
        (headed(name="x" * 10000), "foreign"),
        (headed(round=2), "stale"),
        (headed(run="1" * 16), "stale"),
        (headed(segment="a0"), "stale"),
        (headed(kind="evaluate"), "stale"),
        (sent(), "shape"),
        (sent(row0=torch.ones(4), row1=torch.ones(4)), "shape"),
        (sent(row1=torch.ones(4)), "shape"),
        (sent(row0=torch.ones(5)), "shape"),
        (sent(row0=torch.ones(2, 2)), "shape"),
        (sent(row0=torch.ones(4, dtype=torch.float64)), "dtype"),
        (sent(row0=torch.ones(4, dtype=torch.int32)), "dtype"),
        (headed(name=5), "foreign"),
        (headed(run=None), "stale"),
        (replace(GOOD, values={"failed": "out of\nmemory" * 100}), "failed"),
        (replace(GOOD, values={"failed": ["odd"]}), "failed"),
        (sent(row0=torch.ones(2**19)), "oversized"),
    ],
)
def test_a_message_that_is_not_the_one_asked_for(message: Packet, expected: str) -> None:
    assert kind(pack(message)) == expected


@pytest.mark.parametrize(
    "broken",
    [
        lambda data: b"", lambda data: data[:7], lambda data: data[:-1], lambda data: data[: len(data) // 2],
        lambda data: data + b"x", lambda data: b"\xff" * 8 + data[8:], lambda data: bytes(len(data)),
        lambda data: data.replace(b"F32", b"BAD"), lambda data: data.replace(b"hospital", b"\xff\xfe\xfd\xfcital"),
        lambda data: b"\x80\x04\x95" + data,  # how a pickle begins
    ],
)  # fmt: skip
def test_bytes_that_are_no_message(broken: Callable[[bytes], bytes]) -> None:
    assert kind(broken(pack(GOOD))) == "malformed"


def with_head(about: object, body: bytes = bytes(16)) -> bytes:
    """A reply of safetensors whose head says ``about`` of its tensor, and is otherwise as it should be."""
    size = int.from_bytes((whole := pack(GOOD))[:8], "little")
    text = json.dumps({**json.loads(whole[8 : 8 + size]), "row0": about}).encode()
    return len(text).to_bytes(8, "little") + text + body


odd = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3) | st.integers(-(2**70), 2**70) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
sizes = st.lists(st.sampled_from([0, 1, 2, 4, 2**31, 2**40, 2**63 - 1, 2**63, 2**64]), max_size=4)
places = st.tuples(st.integers(0, 20), st.integers(0, 20))
types = st.sampled_from(["U8", "F32", "F64", "BF16", "F4", "F6_E2M3", "F8_E8M0", "C64", "BOOL", "I64"])


@given(
    st.fixed_dictionaries(
        {"dtype": types | odd, "shape": sizes | odd, "data_offsets": st.tuples(*[st.integers(0, 20)] * 2) | odd}
    )
    | odd,
    st.sampled_from([0, 4, 16, 20]),
)
@example({"dtype": "U8", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}, 0)  # torch: stride calculation overflowed
def test_whatever_a_head_says_of_its_tensor_nothing_is_raised(about: object, size: int) -> None:
    found = validate(EXPECTED, with_head(about, bytes(size)))
    if isinstance(found, Packet):
        assert about == {"dtype": "F32", "shape": [4], "data_offsets": (0, 16)}
    else:
        assert found.kind in ("malformed", "shape", "dtype", "oversized")


def test_the_head_that_is_as_it_should_be_passes() -> None:
    assert isinstance(validate(EXPECTED, with_head({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]})), Packet)


@given(st.binary(max_size=300))
def test_no_bytes_pass_or_raise(data: bytes) -> None:
    assert kind(data) == "malformed"


def test_a_distance_is_a_norm_that_float32_could_not_hold() -> None:
    assert distance(torch.tensor([3.0, 5.0]), torch.tensor([0.0, 1.0])) == 5.0
    assert distance(torch.tensor([1e38] * 100), torch.zeros(100)) == pytest.approx(1e39)


@pytest.mark.parametrize(
    ("norm", "most", "rejected"),
    [
        ([1.0, 2.0, 3.0], None, {}),
        ([1.0, 2.0, 20.0], None, {}),  # ten times is not more than ten times
        ([1.0, 2.0, 20.1], None, {2}),
        ([1.0, 2.0, 20.1], 1.5, {1, 2}),
        ([1.0, 1000.0], None, {}),  # of two nobody can say who is wrong
        ([1.0, 1000.0], 10.0, {1}),
        ([0.0, 0.0, 1.0], None, {}),  # where most did not move, moving is no fault
        ([1.0, 1.0, float("inf")], None, {2}),
        ([1.0, 1.0, float("nan")], None, {2}),
        ([float("nan")], None, {0}),
        ([], 1.0, {}),
    ],
)
def test_who_went_too_far(norm: list[float], most: float | None, rejected: set[int]) -> None:
    assert set(too_far(torch.tensor(norm, dtype=torch.float64), most)) == set(rejected)


@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=9))
def test_the_median_rejects_less_than_half(norm: list[float]) -> None:
    assert 2 * len(too_far(torch.tensor(norm, dtype=torch.float64), None)) < len(norm)
