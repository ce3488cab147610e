"""The negative log-likelihood of tokens, with few logits in memory at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 256
"""Positions whose logits are in memory together: 125 MiB in fp32 at 128,256 tokens."""


def token_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Compute -log p of each target after its hidden state.

    Logits of a long batch are larger than the activations of a small model, and the loss keeps
    three of them in fp32. Of a frozen head only the gradient with respect to the hidden states is
    wanted: each position has its own, whatever the factor it is multiplied by later, so it is taken
    right after the chunk's logits, which then go. The products are those of the plain loss.

    Args:
        head: the language-model head.
        hidden: (P, width) states that predict.
        targets: (P,) tokens.

    Returns:
        fp32 (P,), in nats; differentiable once with respect to ``hidden``, and with respect to what
        is trained of ``head``, for which all logits are kept.
    """
    wanted = torch.is_grad_enabled()
    if wanted and any(p.requires_grad for p in head.parameters()):
        return _plain_nll(head, hidden, targets)
    if wanted and hidden.requires_grad:
        result: Tensor = _HeadNLL.apply(hidden, head, targets)
        return result
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([_plain_nll(head, states, tokens) for states, tokens in parts])


def _plain_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


class _HeadNLL(torch.autograd.Function):
    """Keeps the gradient of each position's NLL in the place of its logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden)
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            states = hidden[chunk].detach().requires_grad_()
            with torch.enable_grad():
                own = _plain_nll(head, states, targets[chunk])
                # Positions share nothing: the sum's gradient has each one's in its own row.
                (gradient[chunk],) = torch.autograd.grad(own.sum(), states)
            nll[chunk] = own.detach()
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0].unsqueeze(1)).to(gradient.dtype), None, None
