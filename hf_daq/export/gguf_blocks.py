"""Weights as blocks of GGUF: what each type of llama.cpp holds, and its bytes.

A type has a block of columns with a scale in float16 and an integer a weight. Integers of a layer are `nn.integers.Integers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_HALF = "<f2"


@dataclass(frozen=True)
class BlockType:
    """A type of llama.cpp.

    columns: of a block. encode: integers of blocks, int16 of shape (blocks, columns), and their step, float32 of shape
    (blocks, 1), to bytes, uint8 of shape (blocks, size).
    """

    name: str
    columns: int
    encode: Callable[[Array, Array], Array]


def _half(value: Array) -> Array:
    """Bytes of float16, (blocks, 2)."""
    with np.errstate(over="ignore"):  # the check finds infinities, and says more about them
        return value.astype(_HALF).view(np.uint8)


def _affine(step: Array, largest: int) -> tuple[Array, Array]:
    """The distance of two codes, and the smallest value for the distance as it was rounded: the error is least around 0."""
    distance = _half(2 * step)
    return distance, _half(distance.view(_HALF).astype(np.float32) * (-largest / 2))


def _bits(codes: Array) -> Array:
    return np.packbits(codes.astype(np.uint8), axis=1, bitorder="little")


def _nibbles(codes: Array) -> Array:
    """The first half of a block in the lower four bits, the second in the upper ones."""
    half = codes.shape[1] // 2
    codes = codes.astype(np.uint8) & 15
    return codes[:, :half] | codes[:, half:] << 4


def _q1_0(integers: Array, step: Array) -> Array:
    return np.hstack([_half(step), _bits(integers > 0)])


def _q2_k(integers: Array, step: Array, per_code: int) -> Array:
    """`d * (16 sub-scales) * code - d * (16 sub-minima)`, all sub-scales alike: one scale for 256 columns."""
    smallest = 3 if per_code == 2 else 2
    codes = ((integers + smallest) // per_code).astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = codes[:, :, 0] | codes[:, :, 1] << 2 | codes[:, :, 2] << 4 | codes[:, :, 3] << 6
    scales = np.full((len(integers), 16), per_code | smallest << 4, np.uint8)
    return np.hstack([scales, packed.reshape(len(integers), -1), _half(step), _half(step)])


def _q4_0(integers: Array, step: Array) -> Array:
    return np.hstack([_half(step), _nibbles(integers + 8)])


def _q4_1(integers: Array, step: Array) -> Array:
    return np.hstack([*_affine(step, 15), _nibbles((integers + 15) // 2)])


def _q5_0(integers: Array, step: Array) -> Array:
    codes = integers + 16
    return np.hstack([_half(step), _bits(codes >> 4), _nibbles(codes)])


def _q5_1(integers: Array, step: Array) -> Array:
    codes = (integers + 31) // 2
    return np.hstack([*_affine(step, 31), _bits(codes >> 4), _nibbles(codes)])


def _tq2_0(integers: Array, step: Array) -> Array:
    """Codes of -1, 0 and 1: in each half of a block, four weights that are 32 columns apart in a byte."""
    codes = (integers + 1).astype(np.uint8).reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    return np.hstack([np.bitwise_or.reduce(codes, axis=2).reshape(len(integers), -1), _half(step)])


def _q8_0(integers: Array, step: Array) -> Array:
    return np.hstack([_half(step), integers.astype(np.int8).view(np.uint8)])


def _f16(integers: Array, step: Array) -> Array:
    return _half(integers * step)


Q4_0, Q8_0, F16 = BlockType("Q4_0", 32, _q4_0), BlockType("Q8_0", 32, _q8_0), BlockType("F16", 1, _f16)
ODD = {
    1: BlockType("Q1_0", 128, _q1_0),
    2: BlockType("Q2_K", 256, lambda integers, step: _q2_k(integers, step, 2)),
    3: Q4_0,
    4: BlockType("Q4_1", 32, _q4_1),
    5: BlockType("Q5_1", 32, _q5_1),
    6: Q8_0,
    7: Q8_0,
    8: F16,  # up to 255 in steps of 2: no type holds them
}
"""The type of odd integers, by the number of bits."""
WHOLE = {
    2: BlockType("Q2_K", 256, lambda integers, step: _q2_k(integers, step, 1)),
    3: Q4_0,
    4: Q4_0,
    5: BlockType("Q5_0", 32, _q5_0),
    6: Q8_0,
    7: Q8_0,
    8: Q8_0,
}
"""The type of integers from `-2**(bits - 1)` to `2**(bits - 1) - 1`."""


TERNARY = BlockType("TQ2_0", 256, _tq2_0)
"""The type of -1, 0 and 1."""


def encode(kind: BlockType, integers: Array, scale: Array, group_size: int | None) -> Array:
    """Bytes of a weight, uint8 of shape (rows, bytes of a row).

    Args:
        integers: int16, shape (rows, columns).
        scale: float32, shape (1, 1), (rows, 1) or (rows, groups): one step of the integers.
        group_size: columns that share a scale, a multiple of `kind.columns`; None without groups.
    """
    rows, columns = integers.shape
    blocks = columns // kind.columns
    if group_size is not None:
        scale = np.repeat(scale, group_size // kind.columns, axis=1)[:, :blocks]
    step = np.broadcast_to(scale, (rows, blocks)).reshape(-1, 1).astype(np.float32)
    return kind.encode(integers.reshape(-1, kind.columns), step).reshape(rows, -1)


def decode(data: Array, name: str, gguf: Any) -> Array:
    """float32 of shape (rows, columns), by the reader of the package gguf; of Q1_0, which it does not read, by one of ours."""
    if name != "Q1_0":
        values: Array = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
        return values
    blocks = np.ascontiguousarray(data).reshape(-1, 18)
    step = blocks[:, :2].copy().view(_HALF).astype(np.float32)
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
    signed: Array = (signs * 2 - 1) * step
    return signed.reshape(len(data), -1)
