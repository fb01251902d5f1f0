"""Rows as bytes: laws of the three formats, what is refused, and what error feedback is for."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mira.core.layout import Layout
from mira.core.wire import BLOCK, Wire, compress, decode, decode_mask, down, encode, encode_mask, num_bytes

WIRES: tuple[Wire, ...] = ("fp32", "bf16", "int8")
# Relative to the block's largest number: half a step of 1/127 (a third float32 rounding on top), half a bf16 ulp of 2^-7.
BOUND = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.5 / 127 * (1 + 1e-5)}
number = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
rows = st.lists(number, max_size=3 * BLOCK).map(lambda values: torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("wire", WIRES)
@given(row=rows)
def test_length_error_and_repetition(wire: Wire, row: Tensor) -> None:
    data = encode(row, wire)
    assert (data.dtype, data.shape) == (torch.uint8, (num_bytes(wire, len(row)),))
    found = decode(data, wire, len(row))
    for block, was in zip(found.split(BLOCK), row.split(BLOCK), strict=True):
        if len(was):
            tiny = 1e-37  # below, a scale loses digits of its own
            assert (
                float((block.double() - was.double()).abs().max())
                <= BOUND[wire] * float(was.double().abs().max()) + tiny
            )
    if wire != "int8":
        assert torch.equal(encode(found, wire), data), "what was rounded once is not rounded again"


@given(row=rows)
def test_fp32_is_exact_in_both_precisions(row: Tensor) -> None:
    assert torch.equal(decode(encode(row, "fp32"), "fp32", len(row)), row)
    double = row.double() / 3
    data = encode(double, "fp32")
    assert len(data) == num_bytes("fp32", len(row), torch.float64) == 8 * len(row)
    assert torch.equal(decode(data, "fp32", len(row), torch.float64), double)


def test_bytes_are_what_the_formula_says() -> None:
    assert [num_bytes(wire, 1000) for wire in WIRES] == [4000, 2000, 1000 + 4 * 4]
    assert [num_bytes(wire, 0) for wire in WIRES] == [0, 0, 0]
    assert [down(wire) for wire in WIRES] == ["fp32", "bf16", "bf16"]


def test_int8_by_hand() -> None:
    row = torch.zeros(BLOCK + 2)
    row[0], row[1], row[-1] = 127.0, -63.6, 2.0
    data = encode(row, "int8")
    assert data[:2].view(torch.int8).tolist() == [127, -64]
    assert data[BLOCK + 1].view(torch.int8).item() == 127
    assert data[BLOCK + 2 :].clone().view(torch.float32).tolist() == [1.0, pytest.approx(2 / 127, rel=1e-7)]


@pytest.mark.parametrize("wire", ["bf16", "int8"])
@given(seed=st.integers(0, 2**31), rounds=st.integers(1, 12))
def test_what_was_sent_adds_up_to_what_was_meant(wire: Wire, seed: int, rounds: int) -> None:
    """Σ sent = Σ meant − last residual, and the residual stays below one round's own error: r ≤ b·(D + r)."""
    generator = torch.Generator().manual_seed(seed)
    meant, sent, residual = torch.zeros(300, dtype=torch.float64), torch.zeros(300, dtype=torch.float64), None
    largest = 0.0
    for _ in range(rounds):
        displacement = torch.randn(300, generator=generator, dtype=torch.float64)
        data, residual = compress(displacement, residual, wire)
        meant, sent = meant + displacement, sent + decode(data, wire, 300, torch.float64)
        largest = max(largest, float(displacement.abs().max()))
    assert residual is not None
    torch.testing.assert_close(sent + residual, meant, rtol=0, atol=1e-12)
    assert float(residual.abs().max()) <= BOUND[wire] / (1 - BOUND[wire]) * largest * (1 + 1e-5)


def test_feedback_carries_what_rounding_alone_would_lose_for_ever() -> None:
    step = torch.zeros(BLOCK)
    step[0], step[1] = 1.0, 0.001  # the second is below half a level of the block
    plain, residual, fed = torch.zeros(BLOCK), None, torch.zeros(BLOCK)
    for _ in range(100):
        plain += decode(encode(step, "int8"), "int8", BLOCK)
        data, residual = compress(step, residual, "int8")
        fed += decode(data, "int8", BLOCK)
    assert float(plain[1]) == 0.0
    assert float(fed[1]) == pytest.approx(0.1, abs=0.5 / 127)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_sent(wire: Wire, bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode(torch.tensor([0.0, bad]), wire)


def test_what_bf16_cannot_hold_is_not_sent() -> None:
    with pytest.raises(ValueError, match="too large for bf16"):
        encode(torch.tensor([torch.finfo(torch.float32).max]), "bf16")


def test_the_largest_number_is_sent_whole_or_not_at_all() -> None:
    largest = torch.finfo(torch.float32).max
    for x in (largest, largest * (1 - 1e-6), largest / 3):
        with suppress(ValueError):  # where 127 scales of it are more than float32 holds
            data = encode(torch.tensor([x]), "int8")
            assert float(decode(data, "int8", 1)) == pytest.approx(x, rel=1e-2)


def doctored(place: slice, values: list[int]) -> Tensor:
    data = encode(torch.ones(3), "int8")
    data[place] = torch.tensor(values, dtype=torch.uint8)
    return data


@pytest.mark.parametrize(
    ("data", "wire", "why"),
    [
        (torch.zeros(11, dtype=torch.uint8), "fp32", "an adapter of 11 bytes; 3 numbers in fp32 are 12"),
        (torch.zeros(13, dtype=torch.uint8), "fp32", "13 bytes"),
        (torch.zeros(3, dtype=torch.uint8), "int8", "3 numbers in int8 are 7"),
        (torch.zeros(0, dtype=torch.uint8), "bf16", "0 bytes"),
        (torch.zeros(12, dtype=torch.int8), "fp32", "not a flat array of bytes"),
        (torch.zeros(3, 4, dtype=torch.uint8), "fp32", "not a flat array of bytes"),
        (torch.full((12,), 255, dtype=torch.uint8), "fp32", "not finite"),
        (torch.full((6,), 255, dtype=torch.uint8), "bf16", "not finite"),
        (doctored(slice(0, 1), [128]), "int8", "-128"),
        (doctored(slice(3, 7), [0, 0, 128, 127]), "int8", "a scale is negative or not finite"),
        (doctored(slice(3, 7), [0, 0, 192, 127]), "int8", "a scale is negative or not finite"),
        (doctored(slice(3, 7), [0, 0, 128, 191]), "int8", "a scale is negative or not finite"),
        (doctored(slice(3, 7), [255, 255, 127, 127]), "int8", "not finite"),
    ],
)
def test_bytes_that_are_no_row_are_refused(data: Tensor, wire: Wire, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode(data, wire, 3)


@given(data=st.binary(max_size=40), size=st.integers(0, 20), wire=st.sampled_from(WIRES))
def test_any_bytes_are_finite_numbers_or_refused(data: bytes, size: int, wire: Wire) -> None:
    try:
        found = decode(torch.tensor(list(data), dtype=torch.uint8), wire, size)
    except ValueError:
        return
    assert found.shape == (size,)
    assert bool(found.isfinite().all())


@given(mask=st.lists(st.booleans(), min_size=1, max_size=70))
def test_a_mask_comes_back_as_it_was(mask: list[bool]) -> None:
    bits = torch.tensor(mask)
    assert torch.equal(decode_mask(encode_mask(bits), len(bits)), bits)


def test_a_mask_of_a_layout_is_short() -> None:
    """Of a million numbers, for one factor and for fewer ranks than the row has: less than a thousandth of its bits."""
    modules = {f"model.layers.{n}.{name}": (576, 576) for n in range(30) for name in ("q", "v")}
    layout = Layout.of(modules, rank=16, alpha=16)
    b = torch.zeros(layout.size, dtype=torch.bool)
    for entry in layout.entries:
        entry.view(b).fill_(entry.factor == "B")
    for mask in (b, layout.within(5), b & layout.within(5)):
        assert torch.equal(decode_mask(encode_mask(mask), len(mask)), mask)
        assert len(encode_mask(mask)) < 1024 < len(mask) / 1000


@given(data=st.binary(max_size=40), size=st.integers(1, 90))
def test_any_bytes_are_a_mask_or_refused(data: bytes, size: int) -> None:
    with suppress(ValueError):
        assert decode_mask(torch.tensor(list(data), dtype=torch.uint8), size).shape == (size,)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (encode_mask(torch.ones(17, dtype=torch.bool)), "other than 9 bits"),
        (encode_mask(torch.ones(8, dtype=torch.bool)), "other than 9 bits"),
        (encode_mask(torch.ones(10, dtype=torch.bool)), "more than 9 bits"),
        (encode_mask(torch.zeros(2**23, dtype=torch.bool)), "other than 9 bits"),
        (encode_mask(torch.ones(9, dtype=torch.bool))[:-1], "other than 9 bits"),
        (torch.cat([encode_mask(torch.ones(9, dtype=torch.bool)), torch.zeros(1, dtype=torch.uint8)]), "other than 9 bits"),
        (torch.zeros(5, dtype=torch.uint8), "not deflated bits"),
        (torch.zeros(5, dtype=torch.bool), "not a flat array"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_mask_are_refused(data: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode_mask(data, 9)
