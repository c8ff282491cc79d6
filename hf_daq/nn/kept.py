"""The quantized weight that a layer keeps while nothing learns, and how a change of what it came from is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WHOLE = 2**13  # elements up to which all are compared
_CHUNK = 251  # numbers in a weighted sum; a prime, so that rows and columns do not end where sums do


class Kept(NamedTuple):
    """A quantized weight, None where it is not known yet to be used twice, and what it came from."""

    source: Fingerprint
    options: tuple[Any, ...]
    weight: Tensor | None


class Fingerprint:
    """What tensors hold: autograd's versions, addresses, copies of small ones, and of large ones sums over their bytes as
    whole numbers. These see what is written through `.data` or in numpy, and cost one pass at the speed of memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.places = _places(tensors)
        self.values = [value.clone() for value in _values(tensors)]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether nothing was written to these tensors since."""
        return self.places == _places(tensors) and all(map(torch.equal, _values(tensors), self.values))


def _values(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What is compared: on a GPU one vector, so that the comparison waits for the device once."""
    values = [tensor.detach() if tensor.numel() <= _WHOLE else _sums(tensor) for tensor in tensors]
    if all(tensor.is_cpu for tensor in tensors):
        return values
    return [torch.cat([value.reshape(-1).view(_BITS[value.itemsize]).long() for value in values])]


def _places(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


def _sums(tensor: Tensor) -> Tensor:
    """int64, some 1/500 of the elements in float32."""
    flat = _flat(tensor.detach())
    per_number = 8 // flat.itemsize
    count = flat.numel() // per_number // _CHUNK * _CHUNK
    numbers = flat[: count * per_number].view(torch.int64).view(-1, _CHUNK)
    factors = torch.arange(1, 2 * _CHUNK, 2, device=flat.device)  # odd: the order counts, and no bit is lost
    sums = numbers @ factors if numbers.is_cpu else (numbers * factors).sum(1)  # a GPU has no such products
    return torch.cat([sums, flat[count * per_number :].view(_BITS[flat.itemsize])])


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _flat(tensor: Tensor) -> Tensor:
    """The elements in the order in which they lie in memory."""
    if not tensor.is_contiguous():
        strides = tensor.stride()
        tensor = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
    flat = tensor.reshape(-1)
    return flat if flat.storage_offset() * flat.itemsize % 8 == 0 else flat.clone()
