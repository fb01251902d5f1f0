"""Cross-entropy on label tokens only, in chunks: the [tokens, vocabulary] logits are never all in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

_CHUNK = 256  # label tokens at a time: 50 MB of logits with a vocabulary of 49 152 in fp32


class LabelLoss(torch.autograd.Function):
    """-log p(target) for each label token [N] from hidden states [N,d] through the frozen ``head``.

    The gradient with respect to the hidden states is made in the forward pass, chunk by chunk, since the logits are
    at hand there; backward only scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, target: Tensor) -> Tensor:
        losses, grads = [], []
        for h, t in zip(hidden.split(_CHUNK), target.split(_CHUNK), strict=True):
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                loss = _nll(head(leaf), t)
            if ctx.needs_input_grad[0]:
                grads.append(torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0])
            losses.append(loss.detach())
        ctx.save_for_backward(*grads)
        return torch.cat(losses) if losses else hidden.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads = torch.cat(ctx.saved_tensors)
        return (grads * grad[:, None]).to(grads.dtype), None, None


@torch.no_grad()
def label_nll(hidden: Tensor, head: nn.Module, target: Tensor) -> Tensor:
    """The same losses [N] without gradients."""
    parts = [_nll(head(h), t) for h, t in zip(hidden.split(_CHUNK), target.split(_CHUNK), strict=True)]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide, target, reduction="none")
