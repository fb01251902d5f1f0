"""Gradient checkpointing: the backward pass recomputes each decoder layer instead of keeping its intermediate results.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. Only the inputs of the layers are kept, and the inside of one
layer at a time. The switch of transformers works in train mode only, which would enable the base's dropout; and torch's
checkpoint with hooks on saved tensors keeps what functions of other libraries (bitsandbytes' 8-bit product) store themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mira.core.errors import UserError
from mira.engine.body import usual_tokens
from mira.engine.model_errors import raise_as

_PROBE = 9  # tokens

Surroundings = Callable[[], AbstractContextManager[Any]]


def _no_surroundings() -> Surroundings:
    return nullcontext


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers marks for checkpointing. Raises UserError when there are none."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        kind = model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
        raise UserError(f"engine.checkpointing=true: architecture '{kind}' marks no layers for it; set it to false")
    return layers


def check_gradients(model: PreTrainedModel) -> None:
    """Raise UserError where recomputed layers give other gradients: a layer may leave something for later ones elsewhere."""

    def cannot(reason: str) -> UserError:
        kind = model.config.model_type
        return UserError(
            f"engine.checkpointing=true: architecture '{kind}' does not support recomputed layers ({reason}); set it to false"
        )

    decoder_layers(model)
    with raise_as(cannot):
        kept, again = _gradient(model, nullcontext()), _gradient(model, recomputed(model))
        if not torch.allclose(kept, again, rtol=1e-3, atol=1e-3 * float(kept.abs().max())):
            raise cannot("other gradients")


def _gradient(model: PreTrainedModel, block: AbstractContextManager[None]) -> Tensor:
    """The gradient of a function of some tokens' logits with respect to their embeddings."""
    leaves: list[Tensor] = []

    def ask(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1].clone()  # some models change their embeddings in place

    hook = model.get_input_embeddings().register_forward_hook(ask)
    try:
        with block:
            tokens = usual_tokens(model)[:_PROBE].to(model.device)
            loss = model(input_ids=tokens[None], use_cache=False).logits.float().square().mean()
        loss.backward()
    finally:
        hook.remove()
    assert leaves[-1].grad is not None
    return leaves[-1].grad


@contextmanager
def recomputed(
    model: nn.Module,
    generators: Callable[[], Sequence[torch.Generator]] = tuple,
    surroundings: Callable[[], Surroundings] = _no_surroundings,
) -> Iterator[None]:
    """Recompute the decoder layers in the backward passes of the block's forward passes, which may run in any thread.

    A backward pass may come after the block. Gradients are those without recomputing. ``generators``: called in each forward pass
    for the generators of the layers' random numbers, such as dropout masks; the second computation draws the same numbers.
    ``surroundings``: called then too; returns the context for the second computation, which a GPU runs in another thread. The
    model must be called with use_cache=False: a layer would write to the cache twice.
    """
    layers = decoder_layers(model)
    own = [vars(layer).get("forward") for layer in layers]  # set by another library, if any
    for layer in layers:
        vars(layer)["forward"] = partial(_call, layer.forward, generators, surroundings)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward") if forward is None else vars(layer).update(forward=forward)


def _call(
    forward: Callable[..., Any], generators: Callable[[], Sequence[torch.Generator]],
    surroundings: Callable[[], Surroundings], *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    top, shape = tree_flatten((args, tuple(kwargs.values())), is_leaf=_is_shared)
    flat, inner = tree_flatten([dict(leaf) if _is_shared(leaf) else leaf for leaf in top])
    places = [n for n, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    tensors, names = [flat[place] for place in places], tuple(kwargs)
    for place in places:
        flat[place] = None  # autograd alone keeps them, and drops them after the backward pass
    shared = [leaf if _is_shared(leaf) else None for leaf in top]
    top.clear()
    made: list[TreeSpec] = []

    def run(*tensors: Tensor) -> tuple[Any, ...]:
        filled = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        before = tree_unflatten(filled, inner)
        now = [x if one is None else _with(one, x) for one, x in zip(shared, before, strict=True)]
        new_args, values = tree_unflatten(now, shape)
        out = forward(*new_args, **dict(zip(names, values, strict=True)))
        written = [
            {} if one is None else {key: value for key, value in after.items() if value is not x.get(key)}
            for one, x, after in zip(shared, before, now, strict=True)
        ]
        leaves, spec = tree_flatten((out, written))
        made[:] = [spec]
        return tuple(leaves)

    # The input of the first layer is frozen: without a tensor that requires gradients, autograd would skip the layer.
    probe = torch.empty(0, requires_grad=True)
    leaves = _Recomputed.apply(run, generators(), surroundings(), probe, *tensors)  # type: ignore[no-untyped-call]
    out, written = tree_unflatten(leaves, made[0])
    for one, new in zip(shared, written, strict=True):
        if one is not None:
            one.update(new)
    return out


def _is_shared(x: Any) -> bool:
    """Tell whether a layer may write to it for later layers, such as keys and values."""
    return isinstance(x, MutableMapping)


def _with(shared: MutableMapping[Any, Any], content: dict[Any, Any]) -> MutableMapping[Any, Any]:
    """A mapping of the same kind with other content."""
    made = copy(shared)
    made.clear()
    made.update(content)
    return made


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], generators: Any, surroundings: Surroundings, probe: Tensor, *tensors: Tensor
    ) -> Any:
        ctx.run, ctx.generators, ctx.surroundings = run, generators, surroundings
        ctx.states = [generator.get_state() for generator in generators]
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        asks = ctx.needs_input_grad[4:]
        inputs = [t.detach().requires_grad_(ask) for t, ask in zip(ctx.saved_tensors, asks, strict=True)]
        with torch.enable_grad(), _rewound(ctx.generators, ctx.states), ctx.surroundings():
            outs = ctx.run(*inputs)
        # Below the first adapter no output requires gradients.
        asking = [n for n, tensor in enumerate(outs) if isinstance(tensor, Tensor) and tensor.requires_grad]
        # Not torch.autograd.grad: the adapters' functions write their gradients themselves.
        torch.autograd.backward([outs[n] for n in asking], [grads[n] for n in asking])
        return None, None, None, None, *(t.grad for t in inputs)


@contextmanager
def _rewound(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> Iterator[None]:
    """Set ``generators`` to ``states`` within the block, and restore them."""
    now = [generator.get_state() for generator in generators]
    _set(generators, states)
    try:
        yield
    finally:
        _set(generators, now)


def _set(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
