"""Independent random streams, each named by its purpose: the same key gives the same numbers everywhere."""

import hashlib

import torch


def stream(*key: object) -> int:
    """A 63-bit seed from a key such as ("cohort", seed, round). Hashed keys do not collide as sums like seed + round do."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(stream(*key))
