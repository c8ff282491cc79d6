"""Kernels of packed layers for a GPU, in Triton. They are imported where they are needed: Triton comes with torch on Linux."""

# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator, no-any-return, attr-defined"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_WHOLE_ROW = 2**30  # a group of columns that has them all
_MANY_ROWS = 64  # of inputs, from which tiles are large

# ------------------------------------------------------------------------------------------------------- codes of weights


@triton.jit
def _weights(
    stream,
    step,
    out,
    columns,
    per_row,
    bits: tl.constexpr,
    zero: tl.constexpr,
    group: tl.constexpr,
    ternary: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    first = row * columns
    if ternary:
        place = (first % 5).to(tl.int32) + column
        code = tl.load(stream + first // 5 + place // 5, mask=inside, other=0).to(tl.int32)
        for before in tl.static_range(1, 5):
            code = tl.where(place % 5 >= before, code // 3, code)
        code = code % 3
    else:
        bit = (first * bits & 7).to(tl.int32) + column * bits
        shift = bit & 7
        address = stream + (first * bits >> 3) + (bit >> 3)
        code = tl.load(address, mask=inside, other=0).to(tl.int32) >> shift
        if 8 % bits != 0:  # some lie in two bytes
            code = code | (tl.load(address + 1, mask=inside & (shift + bits > 8), other=0).to(tl.int32) << (8 - shift))
        code = code & ((1 << bits) - 1)
    scale = tl.load(step + row * per_row + column // group, mask=inside, other=0)
    tl.store(out + first + column, ((code.to(tl.float32) - zero) * scale).to(out.dtype.element_ty), mask=inside)


def weights(coded: Any, step: Tensor, zero: float, dtype: torch.dtype) -> Tensor:
    """The weight, shape (rows, columns)."""
    rows, columns = coded.shape[0], coded.columns()
    out = torch.empty(rows, columns, dtype=dtype, device=coded.stream.device)
    per_row, group = _groups(coded)
    block = min(1024, triton.next_power_of_2(columns))
    ternary = coded.grid == "ternary"
    options = {"bits": coded.bits, "zero": zero, "group": group, "ternary": ternary, "block": block}
    with _on(out):
        _weights[(rows, triton.cdiv(columns, block))](coded.stream, step, out, columns, per_row, **options)
    return out


@triton.jit
def _row(
    x,
    stream,
    step,
    bias,
    out,
    rows,
    per_row,
    eights: tl.constexpr,
    bits: tl.constexpr,
    zero: tl.constexpr,
    group: tl.constexpr,
    has_bias: tl.constexpr,
    many: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0) * many + tl.arange(0, many)
    valid = row < rows
    total = tl.zeros((many, block), tl.float32)
    for first in range(0, eights, block):
        eight = first + tl.arange(0, block)
        inside = eight < eights
        both = valid[:, None] & inside[None, :]
        address = stream + row.to(tl.int64)[:, None] * (eights * bits) + eight[None, :] * bits
        byte = tl.load(address, mask=both, other=0).to(tl.int32)
        part = tl.zeros((many, block), tl.float32)
        for index in tl.static_range(8):
            if index > 0 and index * bits % 8 == 0:
                byte = tl.load(address + index * bits // 8, mask=both, other=0).to(tl.int32)
            code = byte >> (index * bits % 8)
            if index * bits % 8 + bits > 8:
                byte = tl.load(address + index * bits // 8 + 1, mask=both, other=0).to(tl.int32)
                code = code | (byte << (8 - index * bits % 8))
            value = tl.load(x + eight * 8 + index, mask=inside, other=0).to(tl.float32)
            part += ((code & ((1 << bits) - 1)).to(tl.float32) - zero) * value[None, :]
        scale = tl.load(step + row[:, None] * per_row + (eight * 8 // group)[None, :], mask=both, other=0)
        total += part * scale
    result = tl.sum(total, 1)
    if has_bias:
        result += tl.load(bias + row, mask=valid, other=0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=valid)


def one_row(x: Tensor, coded: Any, step: Tensor, zero: float, bias: Tensor | None) -> Tensor:
    """x: shape (1, columns), a multiple of 8. Groups are multiples of 8 too, and codes of three values none."""
    rows, columns = coded.shape
    x, out = x.contiguous(), x.new_empty(1, rows)
    per_row, group = _groups(coded)
    block = min(128, triton.next_power_of_2(columns // 8))
    options = {
        "bits": coded.bits,
        "zero": zero,
        "group": group,
        "has_bias": bias is not None,
        "many": 4,
        "block": block,
    }
    tensors = x, coded.stream, step, x if bias is None else bias.contiguous(), out
    with _on(out):
        _row[(triton.cdiv(rows, 4),)](*tensors, rows, per_row, eights=columns // 8, **options)
    return out


def _groups(coded: Any) -> tuple[int, int]:
    """How many scales a row has of its own, and columns of each."""
    if coded.group_size:
        return -(-coded.columns() // coded.group_size), coded.group_size
    return int(coded.scale.numel() > 1), _WHOLE_ROW


# ---------------------------------------------------------------------------------------------------------- whole numbers


@triton.jit
def _codes(x, rounding, codes, factor, sums, columns, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, inverse, last = tl.load(rounding), tl.load(rounding + 1), tl.load(rounding + 3)
    total = tl.zeros((block,), tl.float32)
    bad = tl.zeros((block,), tl.int32)
    for first in range(0, width, block):
        column = first + tl.arange(0, block)
        value = tl.load(x + row * columns + column, mask=column < columns, other=0).to(tl.float32)
        position = tl.minimum(tl.maximum((value - start) * inverse, 0.0), last)
        whole = tl.ceil(position - 0.5) - 128.0
        tl.store(codes + row * width + column, whole.to(tl.int8), mask=column < width)
        total += tl.where(column < width, whole, 0.0)
        bad = bad | (value != value).to(tl.int32)
    tl.store(sums + row, tl.sum(total, 0).to(tl.int32))
    tl.store(factor + row, tl.where(tl.max(bad, 0) > 0, float("nan"), 1.0))


def codes(x: Tensor, rounding: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `gpu._rounded` of x, filled with zeros to this width."""
    count, columns = x.shape
    found = torch.empty(count, width, dtype=torch.int8, device=x.device)
    factor = torch.empty(count, 1, device=x.device)
    sums = torch.empty(count, 1, dtype=torch.int32, device=x.device)
    block = min(2048, triton.next_power_of_2(width))
    with _on(x):
        _codes[(count,)](x, rounding, found, factor, sums, columns, width=width, block=block)
    return found, factor, sums


@triton.jit(do_not_specialize=["count"])
def _linear(
    codes,
    weight,
    factor,
    sums,
    offset,
    scale,
    bias,
    out,
    count,
    outputs,
    width: tl.constexpr,
    halves: tl.constexpr,
    has_bias: tl.constexpr,
    even: tl.constexpr,
    few: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
):
    down = tl.cdiv(count, tall)
    row = (tl.program_id(0) % down) * tall + tl.arange(0, tall)
    column = (tl.program_id(0) // down) * wide + tl.arange(0, wide)
    of_row = codes + tl.where(row < count, row, 0).to(tl.int64)[:, None] * width
    of_column = weight + tl.where(column < outputs, column, 0).to(tl.int64)[None, :] * width
    found = tl.zeros((tall, wide), tl.int32)
    for first in range(0, width, deep):
        place = first + tl.arange(0, deep)
        left_of, right_of = of_row + place[None, :], of_column + place[:, None]
        if few:  # else all programs would read one line of inputs for rows that are not there
            left = tl.load(left_of, mask=(row < count)[:, None] & (place[None, :] < width), other=0)
        elif even:
            left = tl.load(left_of)
        else:
            left = tl.load(left_of, mask=place[None, :] < width, other=0)
        right = tl.load(right_of) if even else tl.load(right_of, mask=place[:, None] < width, other=0)
        found = tl.dot(left, right, found, out_dtype=tl.int32)
    valid = column < outputs
    whole = (found + tl.load(offset + column, mask=valid, other=0)[None, :]).to(tl.float32)
    if halves:
        whole += tl.load(sums + row, mask=row < count, other=0).to(tl.float32)[:, None] * 0.5
    result = whole * tl.load(scale + column, mask=valid, other=0)[None, :]
    result = result * tl.load(factor + row, mask=row < count, other=0)[:, None]
    if has_bias:
        result += tl.load(bias + column, mask=valid, other=0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(row < count)[:, None] & valid[None, :])


def linear(parts: tuple[Tensor, Tensor, Tensor], layer: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """parts: of `codes`. layer: `gpu.Int8`."""
    found, factor, sums = parts
    count, width, outputs = *found.shape, len(layer.scale)
    out = torch.empty(count, outputs, dtype=dtype, device=found.device)
    many = count >= _MANY_ROWS
    tall, wide, deep = (128, 128, 128) if many else (16, 32, 256)
    tensors = (
        found,
        layer.weight,
        factor,
        sums,
        layer.offset,
        layer.scale,
        out if bias is None else bias.contiguous(),
        out,
    )
    options = {"halves": layer.halves, "has_bias": bias is not None, "even": width % deep == 0, "few": count < tall}
    tiles = {"tall": tall, "wide": wide, "deep": deep, "num_warps": 8 if many else 4, "num_stages": 3}
    grid = (triton.cdiv(count, tall) * triton.cdiv(outputs, wide),)
    with _on(out):
        _linear[grid](*tensors, count, outputs, width=width, **options, **tiles)
    return out


def _on(tensor: Tensor) -> Any:
    """Triton launches where torch's current device is."""
    return torch.cuda.device_of(tensor)
