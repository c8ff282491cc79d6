"""Dense codes: code `i` of `bits` bits is in the bits `i * bits` to `(i + 1) * bits - 1` of a stream of bytes, the least
significant bit of each byte first. The last byte is filled with zeros.

Codes of three values take 1.6 bits: five of them are the digits of a byte in base 3, the least significant digit first.
`bits` is then `TERNARY`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TERNARY, stored_bytes

_POWERS = (1, 3, 9, 27, 81)


def packed_size(count: int, bits: float) -> int:
    """Bytes that hold `count` codes."""
    return stored_bytes(count, bits)


def pack_bits(codes: Tensor, bits: float) -> Tensor:
    """Codes in bytes.

    Args:
        codes: uint8 of any shape, read in C order, each below `2**bits`.
        bits: 1 to 8, or TERNARY.

    Returns:
        uint8, shape (packed_size(codes.numel(), bits),).
    """
    flat = codes.flatten()
    if bits == 8:
        return flat.clone()
    if bits == TERNARY:
        fives = F.pad(flat, (0, -flat.numel() % 5)).view(-1, 5)
        return (fives * fives.new_tensor(_POWERS)).sum(1, dtype=torch.uint8)
    bits = int(bits)
    eights = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(eights), bits, dtype=torch.uint8, device=codes.device)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        packed[:, byte] |= eights[:, index] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= eights[:, index] >> (8 - shift)
    return packed.flatten()[: packed_size(flat.numel(), bits)].clone()


def unpack_bits(packed: Tensor, bits: float, count: int) -> Tensor:
    """Inverse of `pack_bits`: uint8, shape (count,)."""
    if bits == 8:
        return packed
    if bits == TERNARY:
        digits = packed[:, None] // packed.new_tensor(_POWERS) % 3
        return digits.flatten()[:count]
    bits = int(bits)
    return _eights(F.pad(packed, (0, -packed.numel() % bits)).view(-1, bits), bits).flatten()[:count]


def _eights(packed: Tensor, bits: int) -> Tensor:
    """Eight codes from each row of bytes: shape (..., bits) to (..., 8)."""
    codes = packed.new_empty(*packed.shape[:-1], 8)
    mask = 2**bits - 1
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        code = packed[..., byte] >> shift
        if shift + bits > 8:
            code = code | (packed[..., byte + 1] << (8 - shift))
        codes[..., index] = code & mask
    return codes


def unpack_rows(packed: Tensor, bits: float, columns: int, rows: Tensor) -> Tensor:
    """Rows of the codes of a matrix with `columns` columns, of which no other bytes are read.

    Args:
        packed: uint8, from `pack_bits` of the matrix.
        rows: int64, shape (n,).

    Returns:
        uint8, shape (n, columns).
    """
    if bits == TERNARY:
        first = rows * columns
        places = first[:, None] // 5 + torch.arange(-(-columns // 5) + 1, device=rows.device)
        digits = packed[places.clamp_(max=len(packed) - 1)].unsqueeze(2) // packed.new_tensor(_POWERS) % 3
        columns_of = first[:, None] % 5 + torch.arange(columns, device=rows.device)
        return digits.flatten(1).gather(1, columns_of)
    bits = int(bits)
    size = -(-columns // 8) * bits  # bytes of whole eights of codes
    if columns % 8 == 0:
        window = packed.view(-1, size).index_select(0, rows)
    else:  # rows start inside of bytes
        start = rows * (columns * bits)
        places = (start >> 3).unsqueeze(1) + torch.arange(size + 1, device=rows.device)
        found = packed[places.clamp_(max=len(packed) - 1)].to(
            torch.int32
        )  # behind the last byte are none of these codes
        window = ((found[:, :-1] | found[:, 1:] << 8) >> (start & 7).int().unsqueeze(1) & 255).to(torch.uint8)
    codes = window if bits == 8 else _eights(window.view(-1, size // bits, bits), bits).flatten(1)
    return codes[:, :columns]
