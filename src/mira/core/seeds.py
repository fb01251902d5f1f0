"""Independent random streams, each named by what it is for: the same key gives the same numbers everywhere."""

import hashlib

import torch


def stream(*key: object) -> int:
    """A 63-bit seed from a key such as ("cohort", seed, round); keys never collide by arithmetic as seed + round does."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(stream(*key))
