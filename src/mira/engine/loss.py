"""Cross-entropy on label tokens, in chunks: the [tokens, vocabulary] logits are never all in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mira.engine.body import Head

_CHUNK = 256  # label tokens at a time: 50 MB of logits with a vocabulary of 49 152 in fp32


class LabelLoss(torch.autograd.Function):
    """-log p(target) for each label token [N] from hidden states [N,d] through the frozen ``head``.

    The forward pass computes the gradient with respect to the hidden states, chunk by chunk, while the logits are in memory:
    ∂/∂logits = softmax − onehot(target). The backward pass only scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, target: Tensor) -> Tensor:
        losses, grads = [], []
        for h, t in zip(hidden.split(_CHUNK), target.split(_CHUNK), strict=True):
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                logits = head(leaf)
            log_p = _wide(logits.detach()).log_softmax(-1)
            losses.append(-log_p.gather(-1, t[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                grad = log_p.exp_()
                grad.scatter_add_(-1, t[:, None], grad.new_full((len(t), 1), -1))
                grads.append(torch.autograd.grad(logits, leaf, grad.to(logits.dtype))[0])
        ctx.save_for_backward(*grads)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads = torch.cat(ctx.saved_tensors)
        return (grads * grad[:, None]).to(grads.dtype), None, None


@torch.no_grad()
def label_nll(hidden: Tensor, head: Head, target: Tensor) -> Tensor:
    """-log p(target) for each label token [N], without gradients."""
    parts = [_nll(head(h), t) for h, t in zip(hidden.split(_CHUNK), target.split(_CHUNK), strict=True)]
    return torch.cat(parts)


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(_wide(logits), target, reduction="none")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
