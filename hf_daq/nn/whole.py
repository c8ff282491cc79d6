"""Layers in whole numbers by integers.cpp: inputs to codes, products, sums, scale and bias in one call.

    output[c] = scale[c] * sum_i (code_i - zero_point) * weight[c, i] + bias[c]

as in onednn.py, where the processor adds products of bytes in 32 bits; depthwise convolutions anywhere, since floats hold
their few sums exactly. Where each row of the input has a scale, the product is multiplied by it before the bias.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

from .codes import threads
from .native import library

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_PAIR = c_int64 * 2
_LINE = 64  # bytes of a cache line
_EXACT = 2**24  # up to here float32 has every whole number
_SHORT = 2**15 - 1


class _Whole(ctypes.Structure):
    """`Whole` of integers.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("weight", "first", "scale", "channels", "outputs", "groups")),
        *((name, _PAIR) for name in ("kernel", "stride", "dilation")),
        *((name, c_int32) for name in ("depthwise", "halves", "zero", "tokens")),
        ("steps", c_int64),
        *((name, c_float) for name in ("start", "inverse", "levels")),
    )


class _Image(ctypes.Structure):
    """`Image` of integers.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "bias", "y")),
        *((name, c_int64) for name in ("count", "height", "width", "top", "left", "out_height", "out_width")),
        *((name, c_int32) for name in ("channels_last", "kind", "out_kind", "threads")),
    )


class Arranged(NamedTuple):
    """A layer as integers.cpp takes it.

    code: uint8: `Whole`, and behind it what it points to. channels, outputs: of all groups. work: products for one output pixel.
    sizes: (height, width) of images -> top and left padding, and the size of outputs.
    """

    code: Tensor
    channels: int
    outputs: int
    work: int
    sizes: dict[tuple[int, int], tuple[int, int, int, int]]


def arrange(
    layer: Any,
    weight: Tensor,
    scale: Tensor,
    halves: bool,
    rounding: tuple[float, float, int],
    zero_point: int,
    tokens: bool = False,
) -> Arranged | None:
    """None where integers.cpp is not there, or does not compute this layer.

    Args:
        weight: int8, shape (out, in / groups, ...). scale: shape (out,).
        halves: whether the weight means half a code more.
        rounding: `start`, `inverse` of `formula.activation_rows`, and the last code.
        tokens: whether each row has a scale instead of these two.
    """
    functions = library()
    if functions is None:
        return None
    convolution = isinstance(layer, nn.Conv2d)
    kernel = tuple(weight.shape[2:]) if convolution else (1, 1)
    groups = layer.groups if convolution else 1
    outputs, channels = len(weight), weight.shape[1] * groups
    taps = kernel[0] * kernel[1]
    depthwise = convolution and groups == outputs == channels and taps * rounding[2] * 255 < _EXACT
    block = functions.daq_block()
    if not depthwise and block == 0:
        return None
    low, high = weight.aminmax()
    in_short = _SHORT // max(2 * rounding[2] * max(-int(low), int(high)), 1)  # sums of two products
    scale = scale * 0.5 if halves else scale
    if depthwise:
        tensors = _taps(weight.view(outputs, taps), scale, halves, zero_point)
    else:
        runs = weight.view(groups, outputs // groups, -1, *kernel).permute(0, 1, 3, 4, 2)
        joined = groups == 1 and (not convolution or layer.dilation[1] == 1)  # all pixels below a row of the kernel
        wide = in_short == 0 and bool(functions.daq_pairs())
        tensors = _blocks(runs.flatten(3 if joined else 4).flatten(2, -2), scale, block, zero_point, wide)
    steps = (layer.stride, layer.dilation) if convolution else ((1, 1), (1, 1))
    sizes = channels, outputs, groups, *(_PAIR(*pair) for pair in (kernel, *steps))
    rest = *sizes, depthwise, halves, zero_point, tokens, in_short, *rounding
    work = weight.numel() // (1 if depthwise else groups)
    return Arranged(_joined(tensors, rest), channels, outputs, work, {})


def _joined(tensors: tuple[Tensor, ...], rest: tuple[Any, ...]) -> Tensor:
    """`Whole` and the tensors, each on a cache line of its own."""
    parts = [_filled(tensor.flatten().view(torch.uint8), 0, _LINE) for tensor in tensors]
    starts = accumulate((len(part) for part in parts), initial=-(-ctypes.sizeof(_Whole) // _LINE) * _LINE)
    head = torch.frombuffer(bytearray(_Whole(*list(starts)[:-1], *rest)), dtype=torch.uint8)
    return torch.cat([_filled(head, 0, _LINE), *parts])


def _taps(weight: Tensor, scale: Tensor, halves: bool, zero_point: int) -> tuple[Tensor, ...]:
    """weight: shape (channels, taps). Returns weight, nothing, and `scale` of integers.cpp."""
    wide = weight.float() * (2 if halves else 1) + halves
    wide = torch.cat([wide.sum(1, keepdim=True) * -zero_point, wide], 1)
    return _filled(wide.t(), 1, 16).contiguous(), scale[:0], _filled(scale, 0, 16)


def _blocks(weight: Tensor, scale: Tensor, block: int, zero_point: int, wide: bool) -> tuple[Tensor, ...]:
    """weight: shape (groups, out, runs, size of a run). Returns weight, int16 if `wide`, `first` and `scale` of integers.cpp."""
    groups, outputs, runs = weight.shape[:3]
    first = _filled(weight.sum((2, 3), dtype=torch.int32) * -zero_point, 1, block)
    filled = _filled(_filled(weight, 1, block), 3, 4)
    beside = 2 if wide else 4  # bytes, or numbers in 16 bits, make up 32
    parts = filled.view(groups, -1, block, runs, filled.shape[3] // beside, beside)
    arranged = parts.permute(0, 1, 3, 4, 2, 5).contiguous().to(torch.int16 if wide else torch.int8)
    return arranged, first.contiguous(), _filled(scale.view(groups, outputs), 1, block).contiguous()


def _filled(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    """With zeros behind, to a multiple."""
    missing = -tensor.shape[dim] % multiple
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing))


def output(layer: Any, kept: Arranged, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """None where x is not of this layer, or, outside of graphs, an input is NaN, or infinite where each row has a scale.
    In a graph the outputs of such an image or row are NaN then.

    Args:
        x: float32 or bfloat16. bias: float32, shape (out,). dtype: of the output, one of these.
    """
    image = x.ndim == 4 and isinstance(layer, nn.Conv2d)
    if x.shape[1 if image else -1] != kept.channels:
        return None
    sizes = _out_sizes(layer, kept, *x.shape[2:]) if image else ()
    if image and min(sizes[2:]) < 1:
        return None
    arguments = x, kept.code, bias, kept.outputs, kept.work, sizes, dtype
    if torch.compiler.is_compiling():
        in_graph: Tensor = torch.ops.hf_daq.integer_layer(*arguments)
        return in_graph
    result, failed = _computed(*arguments)
    return None if failed else result


def _out_sizes(layer: Any, kept: Arranged, height: int, width: int) -> tuple[int, int, int, int]:
    if torch.compiler.is_compiling():
        return _sizes(layer, height, width)
    sizes = kept.sizes.get((height, width))
    if sizes is None:
        sizes = kept.sizes[height, width] = _sizes(layer, height, width)
    return sizes


def _computed(
    x: Tensor, code: Tensor, bias: Tensor | None, outputs: int, work: int, sizes: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """The output, images in channels last, and whether it means nothing.

    Args:
        sizes: of a convolution of images: top and left padding, and the size of outputs.
    """
    last = bool(sizes) and x.is_contiguous(memory_format=torch.channels_last)
    x = x if last else x.contiguous()
    result = _empty(x, outputs, sizes, dtype)
    pixels = result.numel() // outputs
    lie = (len(x), *x.shape[2:], *sizes, last) if sizes else (1, pixels, 1, 0, 0, pixels, 1, True)
    number = threads(pixels * work // 16)
    bias = None if bias is None else bias.contiguous()
    pointers = x.data_ptr(), None if bias is None else bias.data_ptr(), result.data_ptr()
    image = _Image(*pointers, *lie, _KINDS[x.dtype], _KINDS[dtype], number)
    failed = library().daq_whole(code.data_ptr(), byref(image))  # type: ignore[union-attr]
    if failed == 1:
        raise MemoryError(f"no memory for an input of shape {tuple(x.shape)}")
    return result, failed != 0


def _empty(x: Tensor, outputs: int, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    if not sizes:
        return x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    last = torch.channels_last
    return torch.empty((len(x), outputs, *sizes[2:]), dtype=dtype, device=x.device, memory_format=last)


_library = torch.library.Library("hf_daq", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "integer_layer(Tensor x, Tensor code, Tensor? bias, int outputs, int work, SymInt[] sizes, ScalarType dtype) -> Tensor"
)


def _in_graph(
    x: Tensor, code: Tensor, bias: Tensor | None, outputs: int, work: int, sizes: Sequence[int], *rest: Any
) -> Tensor:
    result, failed = _computed(x, code, bias, outputs, work, sizes, *rest)
    tokens = ctypes.c_int32.from_address(code.data_ptr() + _Whole.tokens.offset).value
    if failed and not tokens:
        bad = with_nan(x, bool(sizes))
        result, _ = _computed(x.masked_fill(bad, 0), code, bias, outputs, work, sizes, *rest)
        result.masked_fill_(bad, torch.nan)
    return result


def with_nan(x: Tensor, image: bool) -> Tensor:
    """Which images or rows have a NaN; broadcasts to x and to what is computed of it."""
    return x.isnan().any(-1, keepdim=True) if not image else x.isnan().flatten(1).any(1).view(-1, 1, 1, 1)


_library.impl("integer_layer", _in_graph, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("hf_daq::integer_layer", lib=_library)
def _(x: Tensor, code: Tensor, bias: Any, outputs: int, work: int, sizes: Any, dtype: torch.dtype) -> Tensor:
    return _empty(x, outputs, sizes, dtype)


def _sizes(layer: Any, *size: int) -> tuple[int, int, int, int]:
    before, out = [], []
    for dim, length in enumerate(size):
        kernel, stride, dilation = layer.kernel_size[dim], layer.stride[dim], layer.dilation[dim]
        if layer.same_pad:
            both = get_same_padding(length, kernel, stride, dilation)
            start = both // 2
        elif isinstance(layer.padding, str):
            start, end = layer._reversed_padding_repeated_twice[2 - 2 * dim : 4 - 2 * dim]
            both = start + end
        else:
            start = layer.padding[dim]
            both = 2 * start
        before.append(start)
        out.append((length + both - (kernel - 1) * dilation - 1) // stride + 1)
    return before[0], before[1], out[0], out[1]
