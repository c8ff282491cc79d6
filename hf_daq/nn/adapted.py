"""Weights with low-rank adapters: `W + s B A`, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional import refuse_second_derivative

# Elements that are computed at once on the CPU, where memory that comes and goes in large pieces is not all used again.
_TILE = 2**20


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scalings: tuple[float, ...], *factors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.scalings = scalings
        ctx.save_for_backward(*factors)
        ctx.mark_dirty(weight)
        _add(weight, scalings, *factors)
        return weight

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        refuse_second_derivative(grad)
        factors, found = ctx.saved_tensors, []
        flat = grad.flatten(1)
        for scaling, a, b in zip(ctx.scalings, factors[::2], factors[1::2], strict=True):
            wide = _wide(grad, a, b)
            rows, columns = a.flatten(1).to(wide), b.flatten(1).to(wide)
            of_a, of_b = torch.zeros_like(rows), torch.empty_like(columns)
            for part in _parts(flat):
                of_delta = flat[part].to(wide) * scaling
                of_a.addmm_(columns[part].t(), of_delta)
                torch.mm(of_delta, rows.t(), out=of_b[part])
            found += [of_a.view_as(a).to(a.dtype), of_b.view_as(b).to(b.dtype)]
        return grad if ctx.needs_input_grad[0] else None, None, *found


def add_adapters_(weight: Tensor, scalings: tuple[float, ...], *factors: Tensor) -> Tensor:
    """`weight += s B A` for one adapter after the other, each sum in float32 at least and rounded to the dtype of the weight.
    For the backward nothing but the factors is kept.

    Args:
        weight: shape (out, ...), contiguous; no leaf that learns.
        scalings: s of each adapter.
        factors: A of shape (rank, ...) and B of shape (out, rank, ...) of each adapter.
    """
    result: Tensor = _Adapted.apply(weight, scalings, *factors)  # type: ignore[no-untyped-call]
    return result


def _add(weight: Tensor, scalings: tuple[float, ...], *factors: Tensor) -> None:
    flat = weight.view(len(weight), -1)
    for scaling, a, b in zip(scalings, factors[::2], factors[1::2], strict=True):
        wide = _wide(weight, a, b)
        rows, columns = a.flatten(1).to(wide), b.flatten(1).to(wide)
        for part in _parts(flat):
            flat[part] = flat[part] + (columns[part] @ rows) * scaling


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _parts(flat: Tensor) -> Iterator[slice]:
    """Some rows after the other; in a graph and on other devices all of them at once."""
    size = max(1, _TILE // flat.shape[1]) if flat.is_cpu and not torch.compiler.is_compiling() else len(flat)
    for first in range(0, len(flat), size):
        yield slice(first, first + size)
