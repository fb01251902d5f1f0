"""The real llama.cpp beside transformers: a tiny model as a GGUF file, and the probabilities that llama.cpp gives with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mira.serving.families import FAMILIES, tiled

_ADDS_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron", "qwen3_5_text")  # norms that multiply by 1 + weight
_WIDTHS = (
    "down_proj",
    "output_linear",
    "mlp.c_proj",
    "w2",
    "fc2",
    "4h_to_h",
)  # layers that read the inner width of an MLP
_NORMS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
_SETTINGS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "num_experts_per_tok": "expert_used_count",
    "num_local_experts": "expert_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "conv_L_cache": "shortconv_l_cache",
    "use_parallel_residual": "parallel_residual",
    "clip_qkv": "clamp_kqv",
}


def write_base(model: PreTrainedModel, path: Path) -> Path:
    """``model`` as llama.cpp keeps it, with a vocabulary of words that mean nothing."""
    config: Any = model.config
    family = FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
    _settings(writer, config, model)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"w{n}" for n in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["w 0"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    for name, tensor in _tensors(model):
        known = name if name == "rope_freqs.weight" else names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, f"{config.model_type}: llama.cpp has no name for {name}"
        end = known.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        if end in family.rows:
            tensor = tensor[family.rows[end](len(tensor), config)]
        if end in family.columns:
            tensor = tensor[:, family.columns[end](tensor.shape[1], config)]
        writer.add_tensor(known, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of ``model`` under the names that the name map knows."""
    config: Any = model.config
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, tensor in model.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or "act_fn" in name:
            continue
        name = name.removeprefix("transformer.") if config.model_type == "bloom" else name
        if "mlp.experts" in name:
            yield from _experts(name, tensor, config.model_type == "gpt_oss")
        elif name.endswith("shared_mlp.input_linear.weight"):
            gate, up = tensor.chunk(2)
            yield name.replace("shared_mlp.input_linear", "mlp.gate_proj"), gate
            yield name.replace("shared_mlp.input_linear", "mlp.up_proj"), up
        elif name in turned:
            yield name, tensor.T
        elif "linear_attn" in name:
            yield _linear(name, tensor, config)
        elif config.model_type in _ADDS_ONE and name.endswith("norm.weight"):
            yield name, tensor + 1
        elif name.endswith("conv.conv.weight"):
            yield name, tensor.squeeze(1)
        else:
            name = name.replace("shared_mlp.output_linear", "mlp.down_proj")
            yield f"{name}.weight" if name.endswith(("sinks", "layer_scalar")) else name, tensor
    if config.model_type == "gemma4_text":  # of the frequencies of global attention, the few that turn
        last = config.per_layer_config[config.num_hidden_layers - 1]
        half, share = last.head_dim // 2, config.rope_parameters["full_attention"]["partial_rotary_factor"]
        yield "rope_freqs.weight", torch.tensor([1.0 if n < int(half * share) else 1e30 for n in range(half)])


def _linear(name: str, tensor: Tensor, config: Any) -> tuple[str, Tensor]:
    """A tensor of a layer of linear attention, converted where llama.cpp keeps it in another form."""
    if name.endswith("A_log"):
        return name, -tensor.exp()[tiled(None)(len(tensor), config)]
    if name.endswith("dt_bias"):
        return name.replace("dt_bias", "dt_proj.bias"), tensor[tiled(None)(len(tensor), config)]
    if name.endswith("conv1d.weight"):
        return name, tensor.squeeze(1)[FAMILIES[config.model_type].rows["attn_qkv"](len(tensor), config)]
    return name, tensor


def _experts(name: str, tensor: Tensor, by_turns: bool) -> Iterator[tuple[str, Tensor]]:
    """Fused experts: [E,2h,d] and [E,d,h]; ``by_turns``, of gpt-oss, [E,d,2h] with gate and up by turns, [E,h,d], and biases."""
    end = "bias" if name.endswith("_bias") else "weight"
    name = name.removesuffix("_bias")
    wide = tensor.transpose(1, 2) if by_turns and end == "weight" else tensor
    if name.endswith("down_proj"):
        yield f"{name}.{end}", wide
        return
    gate, up = (wide[:, ::2], wide[:, 1::2]) if by_turns else wide.chunk(2, 1)
    yield name.replace("gate_up_proj", f"gate_proj.{end}"), gate
    yield name.replace("gate_up_proj", f"up_proj.{end}"), up


def _settings(writer: gguf.GGUFWriter, config: Any, model: PreTrainedModel) -> None:
    heads, layers = config.num_attention_heads, getattr(config, "layer_types", None) or []
    each: Any = config.per_layer_config[0] if config.is_heterogeneous else config
    head = getattr(each, "head_dim", None) or config.hidden_size // heads
    wide = config.per_layer_config[len(layers) - 1].head_dim if config.is_heterogeneous else head  # of global attention
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    norm = next((getattr(config, name) for name in _NORMS if hasattr(config, name)), 1e-5)
    kv = getattr(each, "num_key_value_heads", None) or heads
    inner = [module for name, module in model.named_modules() if name.endswith(_WIDTHS)]
    widths = [m.nx if isinstance(m, Conv1D) else m.in_features for m in inner]
    writer.add_context_length(512)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(max(widths, default=getattr(config, "intermediate_size", 0)))
    writer.add_head_count(heads)
    writer.add_head_count_kv([kv * (layer != "conv") for layer in layers] if "conv" in layers else kv)
    writer.add_key_length(wide)
    writer.add_value_length(wide)
    turned = 1 if wide != head else rope.get("partial_rotary_factor") or 1
    writer.add_rope_dimension_count(int(wide * turned))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    writer.add_layer_norm_eps(norm)
    writer.add_layer_norm_rms_eps(norm)
    writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    if "sliding_attention" in layers and config.model_type != "gemma2":
        writer.add_sliding_window_pattern([layer == "sliding_attention" for layer in layers])
    for key, setting in _SETTINGS.items():
        if getattr(each, key, None) is not None:
            getattr(writer, f"add_{setting}")(getattr(each, key))
    if "linear_attention" in layers:
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(len(layers))
        writer.add_rope_dimension_sections([1, 1, 0, 0])
    if config.model_type == "gemma4_text":
        writer.add_shared_kv_layers(0)
        writer.add_embedding_length_per_layer_input(0)
        writer.add_key_length_swa(head)
        writer.add_value_length_swa(head)
        writer.add_rope_dimension_count_swa(head)
    if config.model_type == "apertus":
        activations = [layer.mlp.act_fn for layer in model.get_decoder().layers]
        for key in ("alpha_n", "alpha_p", "beta", "eps"):
            getattr(writer, f"add_xielu_{key}")([float(getattr(each, key)) for each in activations])


class LlamaCpp:
    """llama.cpp's server in this process, with adapters that are chosen a request."""

    def __init__(self, base: Path, adapters: Sequence[Path] = (), chat_template: str = "") -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(base)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 1024, 1, False, -1
        settings.cpuparams.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.chat_template, settings.use_jinja = chat_template, True
        settings.lora_init_without_apply = True
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        self.server = xllamacpp.Server(settings)
        self.adapters = len(adapters)

    def complete(self, prompt: str | Sequence[int], adapter: int | None, tokens: int, **more: Any) -> dict[str, Any]:
        """The greedy answer to ``prompt`` with ``adapter`` alone, or with none."""
        asked = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        answer: dict[str, Any] = self.server.handle_completions(asked | self._how(adapter, tokens) | more)["choices"][0]
        return answer

    def chat(self, content: str, adapter: int | None, tokens: int) -> str:
        """The greedy answer to a message of the user."""
        asked = {"messages": [{"role": "user", "content": content}]}
        answer = self.server.handle_chat_completions(asked | self._how(adapter, tokens))
        return str(answer["choices"][0]["message"]["content"])

    def _how(self, adapter: int | None, tokens: int) -> dict[str, Any]:
        scales = [{"id": n, "scale": float(n == adapter)} for n in range(self.adapters)]
        return {"n_predict": tokens, "temperature": 0, "cache_prompt": False, "lora": scales}

    def next(self, prompt: Sequence[int], vocabulary: int, adapter: int | None) -> Tensor:
        """The logarithm of the probability of each token to come next [V]."""
        found = self.complete(prompt, adapter, 1, n_probs=vocabulary)["logprobs"]["content"][0]["top_logprobs"]
        result = torch.full((vocabulary,), -torch.inf, dtype=torch.float64)
        for one in found:
            result[one["id"]] = one["logprob"]
        return result
