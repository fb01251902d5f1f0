"""Conversion of a PEFT folder into a GGUF file, the format of llama.cpp's adapters.

llama.cpp computes α/r·B·A·x, where r is the number of rows of A. A file has one α, so B carries the scale of a layer whose scale
differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor

from mira.core.errors import UserError
from mira.serving.families import FAMILIES, TENSORS, Family

if TYPE_CHECKING:
    import gguf

_PREFIX = "base_model.model."
_FACTOR = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_INSIDE = {("mistral3", "mistral"): "ministral3"}  # a text model that llama.cpp calls otherwise inside this one
_WAY_OUT = "--merge writes the whole model, for llama.cpp's convert_hf_to_gguf.py"


def check(config: Any) -> Family:
    """The family of a base model. Raises UserError where its adapters were not tested with llama.cpp."""
    text = config.get_text_config()
    kind = _INSIDE.get((config.model_type, text.model_type), text.model_type)
    if kind not in FAMILIES or not FAMILIES[kind].proven(text):
        raise UserError(
            f"--format gguf: adapters on architecture '{kind}' were not tested with llama.cpp (docs/serving.md lists those that"
            f" were); {_WAY_OUT}"
        )
    return FAMILIES[kind]


def write(peft: Path, config: Any, out: Path, name: str) -> None:
    """Write the adapter in the folder ``peft``, for a base of ``config``, as the file ``out`` with ``name`` as its name inside.

    Raises UserError for an adapter that llama.cpp cannot apply.
    """
    import gguf  # only here: a machine without gguf can train

    family = check(config)
    settings = json.loads((peft / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = _converted(load_file(peft / "adapter_model.safetensors"), settings, family, config.get_text_config())
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[family.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"])
    writer.add_name(name)
    for tensor, value in tensors:
        writer.add_tensor(tensor, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _converted(
    tensors: dict[str, Tensor], settings: dict[str, Any], family: Family, config: Any
) -> list[tuple[str, Tensor]]:
    """PEFT's A and B under llama.cpp's names, with rows and columns in its order."""
    from gguf import get_tensor_name_map

    names, converted = get_tensor_name_map(family.arch, config.num_hidden_layers), []
    for module, (a, b) in _factors(tensors).items():
        if leaf := _expert_tensor(module, settings.get("target_parameters") or (), family):
            count = getattr(config, "num_experts", None) or config.num_local_experts
            a, b = a.view(count, -1, a.shape[1]), b.view(len(b), -1, count).permute(2, 0, 1)  # [E,r,in], [E,out,r]
            found = _in_layer(module, family.experts[leaf])
        else:
            found = _names(module, names, family)
        b = b.double() * (_scale(module, b.shape[-1], settings) * b.shape[-1] / settings["lora_alpha"])
        for name, part in zip(found, b.chunk(len(found), -2), strict=True):
            end = name.rsplit(".", 1)[-1]
            columns, rows = family.columns.get(end), family.rows.get(end)
            converted.append((f"{name}.weight.lora_a", a if columns is None else a[:, columns(a.shape[1], config)]))
            converted.append((f"{name}.weight.lora_b", part if rows is None else part[rows(len(part), config)]))
    return converted


def _expert_tensor(module: str, parameters: Sequence[str], family: Family) -> str | None:
    """The tensor of experts in PEFT's wrapper ``module``: each adapted tensor has a wrapper, the first one innermost."""
    owner = re.sub(r"(\.base_layer)*$", "", module)
    owned = [leaf for leaf in family.experts if any(f".{owner}.{leaf}".endswith(f".{name}") for name in parameters)]
    depth = module.removeprefix(owner).count(".base_layer")
    return owned[-1 - depth] if depth < len(owned) else None


def _in_layer(module: str, names: Sequence[str]) -> list[str]:
    """llama.cpp's tensors ``names`` in the layer that ``module`` is in."""
    return [f"blk.{next(part for part in module.split('.') if part.isdigit())}.{name}" for name in names]


def _factors(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r,in] and B [out,r] of each layer, in the order of their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        end = next((end for end in _FACTOR if name.endswith(end)), None)
        if end is None or not name.startswith(_PREFIX) or tensor.dim() != 2:
            raise UserError(
                f"--format gguf: llama.cpp applies only A and B of LoRA, and this adapter has {name}; {_WAY_OUT}"
            )
        found.setdefault(name.removeprefix(_PREFIX).removesuffix(end), {})[_FACTOR[end]] = tensor
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _names(module: str, names: gguf.TensorNameMap, family: Family) -> list[str]:
    """llama.cpp's names for the weight of ``module``, or for the parts that it is split into, without their ends."""
    if parts := family.parts.get(module.rsplit(".", 1)[-1]):
        return _in_layer(module, parts)
    name: str | None = names.get_name(module.replace("language_model.", "", 1))
    if name is None or not name.endswith(tuple(f".{tensor}" for tensor in TENSORS)):
        raise UserError(
            f"--format gguf: adapters on layer {module} were not tested with llama.cpp; name other layers in"
            f" adapter.targets, or {_WAY_OUT}"
        )
    return [name]


def _scale(module: str, rank: int, settings: dict[str, Any]) -> float:
    """PEFT's scale for a layer of ``rank``."""
    alpha = _of(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"])
    return float(alpha) / (sqrt(rank) if settings.get("use_rslora") else rank)


def _of(pattern: dict[str, float], module: str, default: float) -> float:
    """The value for ``module`` in one of PEFT's patterns, whose keys match the end of a name."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)
