"""Names of the files in a PEFT folder, and the header that MIRA gives its weights."""

from __future__ import annotations

from mira.adapters.types import BaseLike

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PROMPT_ROW = (
    "prompt_encoder.safetensors"  # MIRA's own, beside PEFT's files, which hold a prompt's computed embeddings alone
)
BASE_SHA256 = "base_model_sha256"  # in the header of the weights: of the base they were trained on


def weights_header(base: BaseLike | None) -> dict[str, str]:
    """The metadata of an adapter's weights: PEFT's, and the hash of the base's weights."""
    return {"format": "pt"} | ({} if base is None else {BASE_SHA256: base.sha256})
