"""Linear layers that compute in float as products with integers of 4 and 8 bits, `com.microsoft.MatMulNBits`.

With integers q of b bits and the step S, the weight is `S (q - (2**b - 1) / 2)`. The operator computes
`scale (code - 2**(bits - 1))`, with a scale for each block of columns:

    1 to 3 bits     odd integers 2q - (2**b - 1) in 4 bits, scale S / 2; the file holds q, and the runtime makes the codes
                    when it loads the file
    4 and 8 bits    q, scale S, and S / 2 times the sums of the inputs under each block
    5 to 7 bits     odd integers in 8 bits

Integers of the grid "integer" are q - 2**(b - 1) times the scale, in 4 or 8 bits.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.formula import levels
from ..nn.integers import Integers

_BLOCKS = 16, 32, 64, 128, 256
_SCALE_BITS = 32
_EXACT, _INT8 = 0, 4
"""Values of `accuracy_level`: products in float32, and with the inputs of each block rounded to 8 bits."""


def block_size(columns: int, group_size: int | None, bits: int) -> int | None:
    """How many columns share a scale in the operator: the size that makes the smallest file, among those that the groups
    are multiples of; None where there is none."""
    sizes = [size for size in _BLOCKS if (group_size or size) % size == 0]
    return min(sizes, key=lambda size: ceil(columns / size) * (size * bits + _SCALE_BITS), default=None)


class NBitsProduct:
    """What a layer emits. int8_inputs: the runtime rounds inputs, which makes products of 8 bits fast."""

    def __init__(self, found: Integers, size: int, int8_inputs: bool) -> None:
        rows, columns = found.weight.shape
        self.found, self.size, self.bits = found, size, _store_bits(found.weight_bits)
        self.halves = found.odd and found.weight_bits == self.bits
        codes = (found.weight + levels(self.bits)) // 2 if self.halves else found.weight + 2 ** (self.bits - 1)
        codes = F.pad(codes, (0, -columns % size), value=2 ** (self.bits - 1)).view(rows, -1, size).to(torch.uint8)
        self.codes = codes[..., ::2] | (codes[..., 1::2] << 4) if self.bits == 4 else codes
        steps = found.weight_scale.float().expand(rows, -1) * (2 if self.halves else 1)
        groups = torch.arange(codes.shape[1]) * size // (found.group_size or columns)
        self.scale = steps[:, groups].contiguous()
        self.half_steps = (self.scale / 2).t().contiguous()
        self.attributes: dict[str, Any] = {
            "K": columns,
            "N": rows,
            "bits": self.bits,
            "block_size": size,
            "accuracy_level": _INT8 if int8_inputs else _EXACT,
        }

    def __call__(self, x: Tensor, name: str) -> Tensor:
        """name: of the product in the file."""
        shape, emit = (*x.shape[:-1], len(self.scale)), torch.onnx.ops.symbolic
        step = "2" if self.found.odd else "1"
        notes = {"hf_daq": name, "hf_daq_bits": str(self.found.weight_bits), "hf_daq_step": step}
        output: Tensor = emit(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scale),
            self.attributes,
            dtype=torch.float32,
            shape=shape,
            version=1,
            metadata_props=notes,
        )
        if self.halves:
            notes = {"hf_daq": f"{name}.half_steps", "hf_daq_product": name}
            sums = self._block_sums(x), self.half_steps
            output = output + emit("MatMul", sums, dtype=torch.float32, shape=shape, metadata_props=notes)
        return output if self.found.bias is None else output + self.found.bias

    def _block_sums(self, x: Tensor) -> Tensor:
        """Of the inputs: (..., columns) to (..., blocks)."""
        if x.shape[-1] % self.size:
            x = F.pad(x, (0, -x.shape[-1] % self.size))
        return x.reshape(*x.shape[:-1], -1, self.size).sum(-1)


def _store_bits(bits: int) -> int:
    return 4 if bits <= 4 else 8


def product_of(found: Integers, int8_inputs: bool) -> NBitsProduct | None:
    """The product of a linear layer, or None where the operator does not fit, or would be slower than float."""
    rounded, bits = int8_inputs and found.input_bits is None, _store_bits(found.weight_bits)
    size = block_size(found.weight.shape[1], found.group_size, bits)
    if size is None or (bits == 8 and not rounded):
        return None
    return NBitsProduct(found, size, rounded)
