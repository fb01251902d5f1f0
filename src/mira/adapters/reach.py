"""Layers that a text passes in a model, and layers that mix its tokens, found by passing a short text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mira.core.errors import UserError

_LENGTH = 32  # tokens of the text: more than a block of sparse attention


@torch.enable_grad()
def reached(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> set[str]:
    """The ``layers`` on whose output the model's output for a text depends. Raises UserError where the model takes no text."""
    outs: list[tuple[str, Tensor]] = []

    def seen(name: str, layer: nn.Module, args: Any, out: Any) -> None:
        outs.extend((name, given) for given in _tensors([out])[:1] if given.requires_grad)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(seen, name)).remove)
        logits = _logits(model, text(model))
    grads = torch.autograd.grad(logits.float().sum(), [out for _, out in outs], allow_unused=True)
    return {name for (name, _), grad in zip(outs, grads, strict=True) if grad is not None}


@torch.enable_grad()
def mixers(model: PreTrainedModel, layers: Iterable[str]) -> set[str]:
    """The innermost modules around some of ``layers`` in which a token sees an earlier one: attention, or its substitute."""
    mixing: set[str] = set()

    def tried(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if _mixes(args, kwargs, out):
            mixing.add(name)

    with ExitStack() as hooks:
        for name in {parent for layer in layers for parent in _parents(layer)}:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_hook(partial(tried, name), with_kwargs=True).remove)
        _logits(model, text(model))
    return {name for name in mixing if not any(other.startswith(name + ".") for other in mixing)}


@contextmanager
def plainly(model: PreTrainedModel) -> Iterator[None]:
    """Use eager attention, which every architecture has, while the context is open: an engine may have installed its own."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def text(model: PreTrainedModel) -> Tensor:
    """Ids [1,T] of tokens that are not special to ``model``, no more than it has positions."""
    special = {value for key, value in _settings(model.config.to_dict()) if key.endswith(("token_id", "token_index"))}
    known = len(model.get_input_embeddings().get_parameter("weight"))
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = _LENGTH if most is None or most < 1 else min(_LENGTH, most)
    plain = [token for token in range(min(known, 16 * _LENGTH)) if token not in special] or [0]
    return torch.tensor([(plain * length)[:length]], device=model.device)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of ``ids`` [1,T], differentiable with respect to the embeddings; the weights stay frozen."""

    def unfrozen(embedding: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.detach().requires_grad_().clone()  # a copy, since some models scale it in place

    hook = model.get_input_embeddings().register_forward_hook(unfrozen)
    try:
        with plainly(model):
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # the architecture's code may raise anything
        raise UserError(
            f"model.name={model.config.name_or_path}: architecture '{model.config.model_type}' cannot compute a text of"
            f" {ids.shape[1]} tokens ({type(error).__name__}: {' '.join(str(error).split())[:200]}); take another model"
        ) from error
    finally:
        hook.remove()
    assert isinstance(logits, Tensor)
    return logits


def _mixes(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    """Tell whether the last token of a module's output [1,T,k] depends on earlier tokens of its input."""
    ins = [x for x in _tensors([*args, *kwargs.values()]) if x.requires_grad and x.ndim == 3][:1]
    given = [y for y in _tensors([out])[:1] if y.requires_grad and y.ndim == 3]
    if not ins or not given or ins[0].shape[:2] != given[0].shape[:2]:
        return False
    last = given[0][0, -1].float().sum()
    (grad,) = torch.autograd.grad(last, ins, retain_graph=True, allow_unused=True)
    return grad is not None and bool((grad[0, :-1] != 0).any())


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among ``values``, and in tuples and lists among them."""
    flat = [inner for value in values for inner in (value if isinstance(value, tuple | list) else [value])]
    return [value for value in flat if isinstance(value, Tensor)]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All integer settings of a configuration and of the configurations inside it."""
    inner = [pair for value in config.values() if isinstance(value, dict) for pair in _settings(value)]
    return [(key, value) for key, value in config.items() if isinstance(key, str) and isinstance(value, int)] + inner
