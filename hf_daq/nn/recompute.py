"""Layers whose weight is not kept for the backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def without_weight(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`compute(x)`, of which the backward keeps x alone and computes the rest, as the weight, once more. The product itself
    is not: autograd has all it needs before it. Gradients are the same, bit for bit."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute(x)
    result: Tensor = checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)
    return result
