"""Chat templates of the shapes that instruct models have, written for these tests, and tokenizers of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Kind = Literal["bytes", "metaspace", "metaspace-legacy"]

SYSTEM, ASKED, TOLD, AGAIN, LAST = "Be brief.", "  How are you?", "I am fine.", "1 and 2 make", "3"


@dataclass(frozen=True)
class Family:
    """``learned``: the text of the labels of one exchange, and of each answer of two; ``ends``: the token that ends an answer,
    None where the template writes none. ``rendered``: whether what is trained is the template's rendering to the letter."""

    template: str
    special: tuple[str, ...]
    learned: str
    both: tuple[str, str]
    ends: str | None
    eos: str = "</s>"
    bos: str | None = None
    kind: Kind = "bytes"
    system: bool = True
    stops: tuple[str, ...] = ()
    rendered: bool = True
    values: dict[str, Any] = field(default_factory=dict)
    swallow: tuple[str, ...] = ()  # special tokens that take the white space after them


def _turns(user: str, assistant: str, system: str = "", prompt: str = "", before: str = "", after: str = "") -> str:
    """A template of one piece for each role; in a piece C stands for the content."""
    branches = [("user", user), ("assistant", assistant), *([("system", system)] if system else [])]
    body = "".join(
        f"{{% {'if' if n == 0 else 'elif'} m['role'] == '{role}' %}}{_piece(text)}"
        for n, (role, text) in enumerate(branches)
    )
    refuse = "{% else %}{{ raise_exception('System role not supported') }}" if not system else ""
    loop = f"{{% for m in messages %}}{body}{refuse}{{% endif %}}{{% endfor %}}"
    asked = f"{{% if add_generation_prompt %}}{_quoted(prompt)}{{% endif %}}" if prompt else ""
    return before + loop + after + asked


def _piece(text: str) -> str:
    return "".join(
        "{{ m['content'] }}"
        if part == "C"
        else "{{ m['content'] | trim }}"
        if part == "T"
        else part
        if "{" in part
        else _quoted(part)
        for part in _split(text)
    )


def _split(text: str) -> list[str]:
    out, rest = [], text
    for mark in ("«C»", "«T»"):
        if mark in rest:
            head, _, rest = rest.partition(mark)
            out += [head, mark[1]]
    return [part for part in [*out, rest] if part]


def _quoted(text: str) -> str:
    return "{{ " + repr(text) + " }}" if text else ""


_CHATML = dict(user="<|im_start|>user\n«C»<|im_end|>\n", assistant="<|im_start|>assistant\n«C»<|im_end|>\n",
               system="<|im_start|>system\n«C»<|im_end|>\n", prompt="<|im_start|>assistant\n")  # fmt: skip
_IM = ("<|im_start|>", "<|im_end|>")
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# A thought is kept in answers after the last question, and an empty one is written into the last answer.
_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set thought = m['reasoning_content'] if m['reasoning_content'] is string else '' %}{% set said = m['content'] %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}PROMPT{% endif %}"
)

FAMILIES: dict[str, Family] = {
    "chatml (Qwen2.5, SmolLM2, Yi)": Family(
        _turns(**_CHATML), _IM, "I am fine.<|im_end|>", ("I am fine.<|im_end|>", "3<|im_end|>"), "<|im_end|>", eos="<|im_end|>"
    ),
    "thinking or not (Qwen3)": Family(
        _THINKING.replace(
            "PROMPT", "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        ),
        _IM, "<think>\n\n</think>\n\nI am fine.<|im_end|>", ("I am fine.<|im_end|>", "<think>\n\n</think>\n\n3<|im_end|>"),
        "<|im_end|>", eos="<|im_end|>",
    ),
    "thinking switched off (Qwen3)": Family(
        _THINKING.replace(
            "PROMPT", "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        ),
        _IM, "I am fine.<|im_end|>", ("I am fine.<|im_end|>", "3<|im_end|>"), "<|im_end|>", eos="<|im_end|>",
        values={"enable_thinking": False},
    ),
    "prompt opens a thought, rendering has it (Qwen3-Thinking)": Family(
        _THINKING.replace("PROMPT", "{{ '<think>\\n' }}"), _IM, "\n</think>\n\nI am fine.<|im_end|>",
        ("I am fine.<|im_end|>", "\n</think>\n\n3<|im_end|>"), "<|im_end|>", eos="<|im_end|>",
    ),
    "prompt opens a thought, rendering drops it (DeepSeek-R1)": Family(
        "{{ bos_token }}" + _turns(
            "<|User|>«C»", "<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>", "«C»", "<|Assistant|><think>\n"
        ),
        ("<|User|>", "<|Assistant|>", "<|end|>"), "\n</think>\n\nI am fine.<|end|>",
        ("I am fine.<|end|>", "\n</think>\n\n3<|end|>"), "<|end|>", eos="<|end|>", bos="<s>", rendered=False,
    ),
    "no line breaks (DeepSeek-V3)": Family(
        "{{ bos_token }}" + _turns("<|User|>«C»", "<|Assistant|>«C»<|end|>", "«C»", "<|Assistant|>"),
        ("<|User|>", "<|Assistant|>", "<|end|>"), "I am fine.<|end|>", ("I am fine.<|end|>", "3<|end|>"), "<|end|>",
        eos="<|end|>", bos="<s>",
    ),
    "today's date, trimmed (Llama 3.x)": Family(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}<|eot_id|>"
        + _turns(*(_HEADER.format(r) + "«T»<|eot_id|>" for r in ("user", "assistant", "system")), _HEADER.format("assistant")),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "I am fine.<|eot_id|>",
        ("I am fine.<|eot_id|>", "3<|eot_id|>"), "<|eot_id|>", eos="<|end_of_text|>", bos="<s>", stops=("<|eot_id|>",),
    ),
    "spaces around (Llama 2)": Family(
        _turns("{{ bos_token }}[INST] «T» [/INST]", " «T» {{ eos_token }}"), (), " I am fine. </s>", (" I am fine. </s>", " 3 </s>"),
        "</s>", bos="<s>", kind="metaspace-legacy", system=False,
    ),
    "a space before the answer (Mistral 7B, Mixtral)": Family(
        "{{ bos_token }}" + _turns("[INST] «C» [/INST]", " «C»{{ eos_token }}"), (), " I am fine.</s>", (" I am fine.</s>", " 3</s>"),
        "</s>", bos="<s>", kind="metaspace", system=False,
    ),
    "special instruction tokens (Mistral v0.3, Small 3)": Family(
        "{{ bos_token }}" + _turns("[INST]«C»[/INST]", "«C»{{ eos_token }}", "[SYSTEM_PROMPT]«C»[/SYSTEM_PROMPT]"),
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "I am fine.</s>", ("I am fine.</s>", "3</s>"), "</s>", bos="<s>",
    ),
    "end of turn is not end of text (Gemma 2)": Family(
        "{{ bos_token }}" + _turns(
            "<start_of_turn>user\n«T»<end_of_turn>\n", "<start_of_turn>model\n«T»<end_of_turn>\n", prompt="<start_of_turn>model\n"
        ),
        ("<start_of_turn>", "<end_of_turn>"), "I am fine.<end_of_turn>", ("I am fine.<end_of_turn>", "3<end_of_turn>"),
        "<end_of_turn>", eos="<eos>", bos="<bos>", system=False, stops=("<end_of_turn>",), kind="metaspace",
    ),
    "tokens that swallow line breaks (Phi-3)": Family(
        _turns(
            "<|user|>\n«C»<|end|>\n", "<|assistant|>\n«C»<|end|>\n", "<|system|>\n«C»<|end|>\n", "<|assistant|>\n",
            after="{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "I am fine.<|end|>", ("I am fine.<|end|>", "3<|end|>"), "<|end|>",
        eos="<|endoftext|>", kind="metaspace-legacy", stops=("<|end|>",), swallow=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "separator tokens (Phi-4)": Family(
        _turns(*(f"<|im_start|>{r}<|im_sep|>«C»<|im_end|>" for r in ("user", "assistant", "system")), "<|im_start|>assistant<|im_sep|>"),
        (*_IM, "<|im_sep|>"), "I am fine.<|im_end|>", ("I am fine.<|im_end|>", "3<|im_end|>"), "<|im_end|>", eos="<|endoftext|>",
        stops=("<|im_end|>",),
    ),
    "text headers, SentencePiece (Zephyr, TinyLlama)": Family(
        _turns(*(f"<|{r}|>\n«C»{{{{ eos_token }}}}\n" for r in ("user", "assistant", "system")), "<|assistant|>\n"), (),
        "I am fine.</s>", ("I am fine.</s>", "3</s>"), "</s>", kind="metaspace",
    ),
    "plain words (Vicuna)": Family(
        _turns("USER: «C» ", "ASSISTANT: «C»{{ eos_token }}", "«C» ", "ASSISTANT:"), (), " I am fine.</s>",
        (" I am fine.</s>", " 3</s>"), "</s>", kind="metaspace",
    ),
    "no end of a turn (GLM-4)": Family(
        "[gMASK]" + _turns("<|user|>\n«C»", "<|assistant|>\n«C»", "<|system|>\n«C»", "<|assistant|>\n"),
        ("[gMASK]", "<|user|>", "<|assistant|>", "<|system|>"), "I am fine.<|endoftext|>",
        ("I am fine.<|user|>", "3<|endoftext|>"), None, eos="<|endoftext|>", stops=("<|user|>",), rendered=False,
    ),
    "channels (gpt-oss)": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
        "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
        "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|channel|>final<|message|>I am fine.<|return|>",
        # The end of an earlier turn is not where the model stops: it is read, not learned.
        ("<|channel|>final<|message|>I am fine.", "<|channel|>final<|message|>3<|return|>"), "<|return|>", eos="<|return|>",
    ),
    "a token for each role (Command R)": Family(
        "{{ bos_token }}" + _turns(
            "<|START|><|USER|>«T»<|END|>", "<|START|><|CHATBOT|>«T»<|END|>", "<|START|><|SYSTEM|>«T»<|END|>", "<|START|><|CHATBOT|>"
        ),
        ("<|START|>", "<|END|>", "<|USER|>", "<|CHATBOT|>", "<|SYSTEM|>"), "I am fine.<|END|>", ("I am fine.<|END|>", "3<|END|>"),
        "<|END|>", eos="<|END|>", bos="<s>",
    ),
    "roles between tokens (Granite 3, EXAONE)": Family(
        _turns(*(f"<|role|>{r}<|end_role|>«C»<|eot|>\n" for r in ("user", "assistant", "system")), "<|role|>assistant<|end_role|>"),
        ("<|role|>", "<|end_role|>", "<|eot|>"), "I am fine.<|eot|>", ("I am fine.<|eot|>", "3<|eot|>"), "<|eot|>", eos="<|eot|>",
    ),
    "end of text at the end (OLMo 2, Falcon 3)": Family(
        "{{ bos_token }}" + _turns(
            "<|user|>\n«C»\n", "<|assistant|>\n«C»{{ eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}", "<|system|>\n«C»\n",
            "<|assistant|>\n",
        ),
        (), "I am fine.<|endoftext|>", ("I am fine.<|endoftext|>", "3<|endoftext|>"), "<|endoftext|>", eos="<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "no prompt for an answer": Family(
        _turns(**{**_CHATML, "prompt": ""}), _IM, "<|im_start|>assistant\nI am fine.<|im_end|>",
        ("<|im_start|>assistant\nI am fine.<|im_end|>", "<|im_start|>assistant\n3<|im_end|>"), "<|im_end|>", eos="<|im_end|>",
    ),
}  # fmt: skip

_CORPUS = (
    "Be brief.", "  How are you?", "I am fine. You are fine.", "user\nassistant\nsystem\nmodel\n", "[INST] [/INST] USER: ASSISTANT:",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    *(f"{a} and {b} make {a + b}" for a in range(9) for b in range(9)),
)  # fmt: skip


@cache
def make(name: str, kind: Kind | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, in a kind of its own."""
    family = FAMILIES[name]
    made = _bytes(family) if (kind or family.kind) == "bytes" else _sentencepiece(family, kind or family.kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=family.eos, pad_token="<pad>", unk_token="<unk>",
        **({"bos_token": family.bos} if family.bos else {}), extra_special_tokens=[*family.special],
    )  # fmt: skip
    tokenizer.chat_template = family.template
    return tokenizer


def _special(family: Family) -> list[AddedToken]:
    names = dict.fromkeys(["<unk>", "<pad>", *filter(None, (family.bos, family.eos)), *family.special])
    return [AddedToken(name, special=True, normalized=False, rstrip=name in family.swallow) for name in names]


def _bytes(family: Family) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=_special(family), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(_CORPUS, trainer)
    _with_bos(tokenizer, family)
    return tokenizer


def _sentencepiece(family: Family, kind: Kind) -> Tokenizer:
    """As Llama's: a space before the text; of old also after every special token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw_bytes: Sequence[Any] = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*_special(family), *raw_bytes], initial_alphabet=["▁"], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)  # word by word, so that no token holds a space inside
    if kind == "metaspace-legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    _with_bos(tokenizer, family)
    return tokenizer


def _with_bos(tokenizer: Tokenizer, family: Family) -> None:
    if family.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
        )
