"""The encoding of rows on the wire: one flat array of bytes, of a length that follows from the format.

fp32   the row unchanged, 4 bytes a number (8 where rows are float64): exact in both directions
bf16   2 bytes a number, rounded to nearest
int8   1 byte a number and a float32 scale for each block of 256: x ≈ s·q, s = max|x| / 127 over the block, q = round(x / s)

A site sends a rounded *displacement* from the row it received, which both sides know, and keeps the rounding error. Error
feedback adds that residual to the next displacement (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019), so that
the sum of all sent displacements is exact up to the last residual. Rows to a site travel in bf16 with both rounded formats:
they have no former row to be a displacement from.

Where not all numbers travel, a mask tells which: its bits, deflated. A mask follows the layout and repeats itself, so that a
mask of millions of numbers takes some hundred bytes.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

Wire = Literal["fp32", "bf16", "int8"]
BLOCK = 256  # numbers that share a scale
_LEVELS = 127


def down(wire: Wire) -> Wire:
    """The format of rows to a site."""
    return "fp32" if wire == "fp32" else "bf16"


def num_bytes(wire: Wire, size: int, dtype: torch.dtype = torch.float32) -> int:
    """The bytes that ``encode`` makes of ``size`` numbers, as metrics count them."""
    if wire == "int8":
        return size + 4 * _blocks(size)
    return size * (2 if wire == "bf16" else dtype.itemsize)


def encode(numbers: Tensor, wire: Wire) -> Tensor:
    """``numbers`` [n] as bytes (uint8). Raises ValueError where a number is not finite, or too large for the format."""
    if wire == "fp32":
        packed = numbers.detach().cpu().contiguous()
    elif wire == "bf16":
        packed = numbers.detach().cpu().to(torch.bfloat16)
    else:
        packed = _to_int8(numbers.detach().cpu().float())
    if packed.is_floating_point() and not bool(packed.isfinite().all()):
        raise ValueError(f"a number is not finite, or too large for {wire}")
    return packed.view(torch.uint8)


def decode(data: Tensor, wire: Wire, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The ``size`` numbers in ``data``. Raises ValueError unless ``data`` is the encoding of so many finite numbers."""
    expected = num_bytes(wire, size, dtype)
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"an adapter is {data.dtype} of {data.dim()} dimensions, not a flat array of bytes")
    if len(data) != expected:
        raise ValueError(f"an adapter of {len(data)} bytes; {size} numbers in {wire} are {expected}")
    data = data.clone()  # aligned for every dtype
    found = _from_int8(data, size) if wire == "int8" else data.view(torch.bfloat16 if wire == "bf16" else dtype)
    if not bool(found.isfinite().all()):
        raise ValueError("an adapter holds numbers that are not finite")
    return found.to(dtype)


def compress(displacement: Tensor, residual: Tensor | None, wire: Wire) -> tuple[Tensor, Tensor]:
    """(bytes of ``displacement`` + ``residual``, the rounding error: the next residual [n]). Raises ValueError as encode."""
    meant = displacement if residual is None else displacement + residual
    data = encode(meant, wire)
    return data, meant - decode(data, wire, len(meant), meant.dtype)


def encode_mask(mask: Tensor) -> Tensor:
    """``mask`` [n] bool as bytes (uint8)."""
    eights = torch.nn.functional.pad(mask.cpu().to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    bits = (eights << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    return torch.frombuffer(bytearray(zlib.compress(bits.numpy().tobytes())), dtype=torch.uint8)


def decode_mask(data: Tensor, size: int) -> Tensor:
    """The mask [size] in ``data``. Raises ValueError unless ``data`` is the encoding of such a mask. Never unpacks more than
    ``size`` bits."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"a mask is {data.dtype} of {data.dim()} dimensions, not a flat array of bytes")
    most, inflate = -(-size // 8), zlib.decompressobj()
    try:
        bits = inflate.decompress(data.numpy().tobytes(), most + 1)
    except zlib.error as error:
        raise ValueError(f"a mask that is not deflated bits ({error})") from None
    if len(bits) != most or not inflate.eof or inflate.unused_data:
        raise ValueError(f"a mask of other than {size} bits")
    eights = torch.frombuffer(bytearray(bits), dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8)
    whole = (eights & 1).bool().flatten()
    if bool(whole[size:].any()):
        raise ValueError(f"a mask of more than {size} bits")
    return whole[:size]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _to_int8(x: Tensor) -> Tensor:
    """The numbers [n] as int8, then the scales as bytes."""
    if not bool(x.isfinite().all()):
        raise ValueError("a number is not finite")
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1) / _LEVELS
    if not bool((scale * _LEVELS).isfinite().all()):
        raise ValueError("a number is too large for int8")
    q = torch.where(scale[:, None] > 0, blocks / scale[:, None], 0.0).round().clamp(-_LEVELS, _LEVELS)
    return torch.cat([q.to(torch.int8).flatten()[: len(x)].view(torch.uint8), scale.view(torch.uint8)])


def _from_int8(data: Tensor, size: int) -> Tensor:
    q, scale = data[:size].view(torch.int8), data[size:].clone().view(torch.float32)
    if bool((q < -_LEVELS).any()):
        raise ValueError("an adapter holds -128, which is not a level of int8 here")
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError("a scale is negative or not finite")
    return q.float() * scale.repeat_interleave(BLOCK)[:size]
