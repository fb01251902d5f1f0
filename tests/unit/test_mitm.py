"""What the tap finds: a text in each of its writings, and nothing where it is not."""

from __future__ import annotations

import gzip
import os
import zlib

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from helpers.mitm import encodings, secrets_in, traces
from helpers.tiny_models import VOCABULARY

TEXT = "diagnosis of hospital-1, é"


@pytest.mark.parametrize("name", encodings(TEXT, VOCABULARY))
def test_a_text_is_found_in_each_writing(name: str) -> None:
    written = encodings(TEXT, VOCABULARY)[name]
    assert name in traces(b"before" + written + b"after", TEXT, VOCABULARY)


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_a_text_is_found_where_it_is_packed(pack: object) -> None:
    assert callable(pack)
    packed = pack(b"a" * 5000 + TEXT.encode() + os.urandom(5000))
    assert TEXT.encode() not in packed
    assert secrets_in([b"x" * 100, b"x" * 99 + packed[:-4] + b"end"], [TEXT], VOCABULARY) == [
        f"{TEXT}: utf-8 packed at 99"
    ]


def test_nothing_is_found_where_nothing_is() -> None:
    assert secrets_in([os.urandom(1 << 18), b"diagnosis of hospital-2"], [TEXT], VOCABULARY) == []
