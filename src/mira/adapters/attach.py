"""Patch a frozen base so that it computes many adapters at once: its layers use the fused functions while a batch is set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from mira.adapters.experts import per_client
from mira.adapters.fused import AddAdapter, GatedMLP, Projection, Projections, RMSNorm, is_plain
from mira.adapters.lowrank import AdapterBatch, Factors, dropout_mask
from mira.adapters.virtual import VirtualTokens
from mira.core.device import sent
from mira.core.layout import Entry, Layout
from mira.core.threads import check_cancelled

Forward = Callable[..., Any]

# Projections of one parent that read the same input, by the names transformers gives them.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class Attached:
    """Patched forward functions of a base model. Set ``adapters`` before a pass, in the thread that computes it; ``detach``
    restores the base."""

    dropout: float
    last: nn.Module | None = (
        None  # the last gated MLP: no token sees another after it, so it computes only the needed ones
    )
    mlps: list[nn.Module] = field(default_factory=list)  # gated MLPs that were patched
    before: list[tuple[nn.Module, Forward | None]] = field(default_factory=list)
    here: threading.local = field(default_factory=threading.local)

    @property
    def adapters(self) -> AdapterBatch | None:
        """The adapters of this thread's pass."""
        return getattr(self.here, "adapters", None)

    @adapters.setter
    def adapters(self, adapters: AdapterBatch | None) -> None:
        self.here.adapters = adapters

    @contextmanager
    def using(self, adapters: AdapterBatch) -> Iterator[None]:
        """Set ``adapters`` for this thread while the context is open."""
        before, self.adapters = self.adapters, adapters
        try:
            yield
        finally:
            self.adapters = before

    def detach(self) -> None:
        """Restore every patched forward function."""
        while self.before:
            module, forward = self.before.pop()
            vars(module).pop("forward") if forward is None else vars(module).update(forward=forward)

    def patch_forward(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        """Replace the forward function of ``module`` by ``make(forward)``. A cancelled pass ends at the next such call."""
        self.before.append((module, vars(module).get("forward")))  # other libraries put theirs on the instance too
        made = make(module.forward)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            check_cancelled()
            return made(*args, **kwargs) if self is module else type(self).forward(self, *args, **kwargs)

        # A bound method: a deep copy of the model then has one bound to the copy. It must not compute with this module.
        vars(module)["forward"] = MethodType(forward, module)


def attach(model: PreTrainedModel, layout: Layout, dropout: float) -> Attached:
    """Patch norms and gated MLPs that compute the usual formula, groups of projections with one input, and every target."""
    attached = Attached(dropout)
    entries = {(entry.module, entry.factor): entry for entry in layout.entries}
    factors = {name: Factors(entries[name, "A"], entries[name, "B"], layout.scale) for name in layout.modules}
    for name, module in model.named_modules():  # first, while the children of an MLP are still plain
        _attach_norm(attached, module)
        _attach_mlp(
            attached, module, [factors.get(f"{name}.{child}") for child in ("gate_proj", "up_proj", "down_proj")]
        )
    owned: dict[str, dict[str, Factors]] = {}
    for name in layout.experts:
        owner, _, leaf = name.rpartition(".")
        owned.setdefault(owner, {})[leaf] = factors[name]
    for owner, own in owned.items():
        attached.patch_forward(model.get_submodule(owner), _by_client(attached, model.get_submodule(owner), own))
    done = set(layout.experts)
    for name, parent in model.named_modules():
        for group in _GROUPS:
            paths = [f"{name}.{child}" for child in group]
            members = _plain_members(parent, group)
            if members:
                _attach_group(attached, [Projection(m, factors.get(p)) for m, p in zip(members, paths, strict=True)])
                done.update(paths)
    for name in layout.modules:
        if name in done:
            continue
        module = model.get_submodule(name)
        if is_plain(module):
            _attach_group(attached, [Projection(module, factors[name])])
        else:
            attached.patch_forward(module, _adapted(attached, factors[name]))
    for module in model.modules():  # those without an adapter, and the head
        if isinstance(module, nn.Linear) and is_plain(module):
            attached.patch_forward(module, _adapted(attached, None, module))
    if layout.virtual_tokens:
        attached.patch_forward(model.get_input_embeddings(), _prompted(attached, layout.entries))
    return attached


def _plain_members(parent: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The children called ``names``; empty where one is missing or is no plain layer."""
    members = [child for name in names if isinstance(child := getattr(parent, name, None), nn.Module)]
    return members if len(members) == len(names) and all(map(is_plain, members)) else []


def _probe(adapters: AdapterBatch) -> Tensor:
    return torch.empty(0, requires_grad=adapters.grad is not None)


def _attach_group(attached: Attached, group: Sequence[Projection]) -> None:
    """Patch a group of projections: the first one called computes all, and the others return their ready output."""

    def make(number: int) -> Callable[[Forward], Forward]:
        def patch(plain: Forward) -> Forward:
            adapted = _adapted(attached, group[number].factors)(plain)

            def forward(x: Tensor) -> Tensor:
                adapters = attached.adapters
                if adapters is None or adapters.dropout is not None:
                    return adapted(x)  # type: ignore[no-any-return]
                seen, out = adapters.ready.pop(group[number].module, (None, None))
                if seen is x and out is not None:
                    return out
                outs = Projections.apply(x, _probe(adapters), group, adapters)  # type: ignore[no-untyped-call]
                adapters.ready.update({one.module: (x, out) for one, out in zip(group, outs, strict=True)})
                return adapters.ready.pop(group[number].module)[1]

            return forward

        return patch

    for number, projection in enumerate(group):
        attached.patch_forward(projection.module, make(number))


def _adapted(
    attached: Attached, factors: Factors | None, linear: nn.Linear | None = None
) -> Callable[[Forward], Forward]:
    """Patch any layer: its own output, plus that of its adapter where it has one. ``linear``: the layer, if it is a plain one."""

    def patch(plain: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            adapters = attached.adapters
            frozen = None if adapters is None or linear is None else adapters.frozen
            out: Tensor = plain(x) if frozen is None or linear is None else frozen.multiply(x, linear)
            if adapters is None or factors is None:
                return out
            seen = x
            if adapters.dropout is not None:
                flat = x.reshape(-1, x.shape[-1])
                seen = (flat * dropout_mask(flat, adapters, attached.dropout)).view(x.shape)
            return AddAdapter.apply(out, seen, _probe(adapters), factors, adapters)  # type: ignore[no-any-return, no-untyped-call]

        return forward

    return patch


def _by_client(attached: Attached, module: nn.Module, factors: dict[str, Factors]) -> Callable[[Forward], Forward]:
    """Patch a module that owns tensors of experts with adapters."""

    def patch(plain: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            adapters = attached.adapters
            if adapters is None:
                return plain(*args, **kwargs)
            return per_client(module, factors, adapters, attached.using, _probe(adapters), args, kwargs)

        return forward

    return patch


def _prompted(attached: Attached, entries: Sequence[Entry]) -> Callable[[Forward], Forward]:
    """Patch the input embeddings: placeholders get the embeddings that each adapter computes for them."""

    def patch(plain: Forward) -> Forward:
        def forward(ids: Tensor) -> Tensor:
            adapters, virtual = attached.adapters, ids.flatten() < 0
            if adapters is None or not bool(virtual.any()):
                return plain(ids)  # type: ignore[no-any-return]
            hidden = plain(ids.clamp(min=0))
            return VirtualTokens.apply(hidden, _probe(adapters), ids.flatten(), entries, adapters)  # type: ignore[no-any-return, no-untyped-call]

        return forward

    return patch


def _attach_norm(attached: Attached, module: nn.Module) -> None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        return

    def fused(x: Tensor) -> Tensor:
        return RMSNorm.apply(x, module.weight, epsilon)  # type: ignore[no-any-return, no-untyped-call]

    def patch(plain: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Some norms also take a gate or a residual, or an input of another width.
            alone = attached.adapters is not None and len(args) == 1 and not kwargs and args[0].shape[-1] == len(weight)
            return fused(*args) if alone else plain(*args, **kwargs)

        return forward

    # In fp32 at least: bf16 cannot tell 1 + w from w where w is large. The mean is not 0, as LayerNorm would subtract it.
    # Some inputs are small, so that the epsilon shows.
    x = _random(weight).to(torch.promote_types(weight.dtype, torch.float32)) + 1
    if _computes(module, fused, x * x.new_tensor([1e-3, 0.1, 1, 10])[:, None]):
        attached.patch_forward(module, patch)


def _attach_mlp(attached: Attached, module: nn.Module, factors: Sequence[Factors | None]) -> None:
    members = _plain_members(module, ("gate_proj", "up_proj", "down_proj"))
    if not members:
        return
    gate, up, down = (Projection(m, f) for m, f in zip(members, factors, strict=True))

    def unadapted(x: Tensor) -> Tensor:
        return down(silu(gate(x)) * up(x))

    def fused(x: Tensor, adapters: AdapterBatch) -> Tensor:
        return GatedMLP.apply(x, _probe(adapters), (gate, up), down, adapters)  # type: ignore[no-any-return, no-untyped-call]

    # From small inputs, where activations differ in curvature, to large ones, which some models clip.
    x = _random(gate.weight[0])
    size = torch.linalg.vector_norm(gate(x).detach(), dim=-1, keepdim=True) / len(gate.weight) ** 0.5
    if not _computes(module, unadapted, x / size * x.new_tensor([0.1, 1, 10, 50])[:, None]):
        return

    def patch(plain: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            adapters = attached.adapters
            if adapters is None or adapters.dropout is not None or len(args) != 1 or kwargs:
                return plain(*args, **kwargs)
            if module is attached.last and adapters.needed is not None:
                return _scattered(fused, args[0], adapters)
            return fused(args[0], adapters)

        return forward

    attached.patch_forward(module, patch)
    attached.mlps.append(module)


def _scattered(function: Callable[[Tensor, AdapterBatch], Tensor], x: Tensor, adapters: AdapterBatch) -> Tensor:
    """Apply ``function`` to the needed tokens of x [1,T,k] or [T,k]; the output of all others is 0."""
    assert adapters.needed is not None
    if not len(adapters.needed):
        return torch.zeros_like(x)
    places = sent(adapters.needed, x.device)
    needed = function(x.index_select(-2, places), adapters.only(adapters.needed))
    return torch.zeros_like(x).index_copy(-2, places, needed)


def _random(like: Tensor) -> Tensor:
    """Random inputs [4,k] for a layer with a weight ``like`` [k]."""
    return torch.randn(4, len(like), generator=torch.Generator().manual_seed(0)).to(like)


@torch.no_grad()
def _computes(module: nn.Module, guess: Forward, x: Tensor) -> bool:
    """Try whether ``module`` computes ``guess`` on every row of x: the names of its parts do not tell its formula."""
    try:
        given = module(x)
    # The module needs more than one input, or another shape.
    except (TypeError, AttributeError, IndexError, RuntimeError, ValueError, AssertionError, KeyError):
        return False
    if not isinstance(given, Tensor) or given.shape != x.shape:
        return False
    # The same formula differs only by rounding; another one differs by far more.
    bound = 0.02 if x.dtype in (torch.bfloat16, torch.float16) else 1e-4
    error, size = (torch.linalg.vector_norm(t, dim=-1) for t in (given - guess(x), given))
    return bool((error <= bound * size).all())
