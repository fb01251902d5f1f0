"""The weights of a PEFT folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from mira.adapters.peft_files import BASE_SHA256, save_weights


@dataclass(frozen=True)
class Base:
    sha256: str = "ab" * 32
    revision: str | None = None


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    tensors = {"lora_A": torch.arange(6.0).view(2, 3), "lora_B": torch.ones(3)}
    contents = set()
    for n in range(20):  # safetensors' own order of two entries differs in every second file
        save_weights(tensors, tmp_path / f"{n}.safetensors", Base())  # type: ignore[arg-type]
        contents.add((tmp_path / f"{n}.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", BASE_SHA256: "ab" * 32}
        assert torch.equal(file.get_tensor("lora_A"), tensors["lora_A"])
