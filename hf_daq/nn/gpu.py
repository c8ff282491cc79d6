"""Packed layers on a GPU.

Layers whose inputs are quantized add products of whole numbers as in onednn.py, with codes and weights in int8. Weights are
computed from their codes by one kernel for the whole layer, bit for bit as in torch; with one row of inputs, as in
`generate`, a kernel reads the codes and computes the product at once. The kernels are those of triton_kernels.py; in
graphs of `torch.compile` the same is written in operators of torch, `torch._int_mm` among them.

`pack(model, fast=True)` asks for torch's kernel of 4-bit weights, which rounds scales to bfloat16.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TERNARY, stored_bits
from . import kernels
from .bitpack import packed_size
from .formula import center, round_half_down_
from .trust import agrees

_SHIFT = 128  # between codes, to 255, and int8
_MOST = 2**31 // (128 * (255 + 64))  # columns whose sums, and half of the sum of codes, fit 32 bits
_FEWEST_ROWS, _ALIGNED = 32, 16  # torch._int_mm takes more than 16, and multiples of 8; kernels read 16 bytes at once
_SMALL, _MANY = 2**14, 2**31  # weights between which a compiled kernel serves
_INT4_ROWS = 32  # of inputs up to which torch's kernel of 4-bit weights is taken
_FEW_OUTPUTS = 64  # that are compared
_ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def used(tensor: Tensor) -> bool:
    """Whether layers whose codes lie with this tensor compute as told here."""
    return tensor.is_cuda


@torch._dynamo.assume_constant_result  # type: ignore[attr-defined]
def in_graph() -> bool:
    """Whether a graph is made to be run here; not to be exported. In graphs older versions of torch always say that it is."""
    return not torch.compiler.is_exporting()


# ------------------------------------------------------------------------------------------------------- whole numbers


class Int8(NamedTuple):
    """A linear layer whose inputs are quantized.

    weight: int8, shape (out, in), filled with zeros to multiples of 8. scale: shape (out,), of the sums.
    offset: int32, shape (out,): what the sums lack, as codes are less by 128, and count from the zero point.
    rows: as of `kernels.run_codes`; None where each token has a scale.
    halves: whether the weight means half a code more, odd integers of 8 bits: half of the sum of codes is added.
    """

    weight: Tensor
    scale: Tensor
    offset: Tensor
    rows: Tensor | None
    halves: bool


def int8(weight: Tensor, scale: Tensor, rows: Tensor | None, zero_point: int, halves: bool) -> Int8 | None:
    """None where 32 bits do not hold the sums, or there are no kernels. weight: int8, shape (out, in)."""
    outputs, columns = weight.shape
    if columns >= _MOST or (weight.is_cuda and not kernels.available("cuda")):
        return None
    filled = F.pad(weight, (0, -columns % _ALIGNED, 0, -outputs % _ALIGNED)).contiguous()
    lacking = weight.sum(1, dtype=torch.int32) + (filled.shape[1] // 2 if halves else 0)
    return Int8(filled, scale, lacking * (_SHIFT - zero_point), rows, halves)


def product(x: Tensor, layer: Int8, a_quant: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the layer gives for an input that is not quantized yet, in this dtype."""
    flat, outputs = x.detach().reshape(-1, x.shape[-1]), len(layer.scale)
    compute = _in_kernels if x.is_cuda and not torch.compiler.is_compiling() else _by_torch
    return compute(flat, layer, a_quant, bias, dtype).view(*x.shape[:-1], outputs)


def _in_kernels(x: Tensor, layer: Int8, a_quant: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from . import triton_kernels

    width = layer.weight.shape[1]
    if layer.rows is None:
        parts = _of_tokens(*a_quant.coded(F.pad(x, (0, width - x.shape[1]))))
    else:
        parts = triton_kernels.codes(x.contiguous(), layer.rows, width)
    return triton_kernels.linear(parts, layer, bias, dtype)


def _by_torch(x: Tensor, layer: Int8, a_quant: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same of operators that inductor compiles."""
    (count, columns), outputs = x.shape, len(layer.scale)
    x = F.pad(x, (0, layer.weight.shape[1] - columns, 0, max(_FEWEST_ROWS - count, 0)))
    codes, factor, sums = _of_tokens(*a_quant.coded(x)) if layer.rows is None else _rounded(x, layer.rows)
    whole = (torch._int_mm(codes, layer.weight.t())[:, :outputs] + layer.offset).float()
    if layer.halves:
        whole = whole + sums.float() / 2
    output = whole * layer.scale * factor
    return (output if bias is None else output + bias.float()).to(dtype)[:count]


def _rounded(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes less 128, and for each row a factor of its outputs, NaN where one of its inputs is, and the sum of codes."""
    start, inverse, first, last = rows.unbind()
    wide = x.to(rows.dtype)
    whole = round_half_down_(((wide - start) * inverse).clamp(first, last)) - _SHIFT
    factor = torch.where((wide != wide).any(1, keepdim=True), torch.nan, 1.0)
    return whole.to(torch.int8), factor, whole.sum(1, keepdim=True).to(torch.int32)


def _of_tokens(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    whole = (codes.to(torch.int16) - _SHIFT).to(torch.int8)
    return whole, scale.float(), whole.sum(1, keepdim=True, dtype=torch.int32)


# --------------------------------------------------------------------------------------------------------------- codes


def weights(coded: Any, dtype: torch.dtype) -> Tensor | None:
    """As from `dequantize_weight`, bit for bit; None where a kernel would not serve. coded: `codes.Coded`."""
    return _computed(coded, dtype) if _serves(coded, dtype) else None


def _computed(coded: Any, dtype: torch.dtype) -> Tensor:
    step = _step(coded)
    if coded.stream.is_cuda and not torch.compiler.is_compiling():
        from . import triton_kernels

        found = triton_kernels.weights(coded, step, center(coded.bits, coded.grid), dtype)
    else:
        found = _values(coded, step).to(dtype)
    return found.view(coded.shape)


class Row(NamedTuple):
    """What a layer keeps for `one_row`, which takes less time than to find it out. sources: of `_places`."""

    sources: tuple[Any, ...]
    dtype: torch.dtype
    coded: Any
    step: Tensor


def row_forward(layer: Any, x: Tensor) -> Tensor:
    """The output for an input that `serves_row`."""
    coded = layer.coded()
    if torch.compiler.is_compiling():
        return _one_row(x, coded, _step(coded), layer.bias)
    with torch.inference_mode(False):
        kept = layer._row = Row(_places(layer), x.dtype, coded, _step(coded))
    return _one_row(x, coded, kept.step, layer.bias)


def at_once(layer: Any, x: Tensor) -> Tensor | None:
    """The output where the layer went this way before, for an input of numbers alone; else None."""
    kept: Row | None = layer.__dict__.get("_row")
    if kept is None or x.dtype != kept.dtype or not x.numel() == kept.coded.shape[1] == x.shape[-1]:
        return None
    bias = layer.bias
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    plain = x.device == kept.step.device and (bias is None or bias.dtype == x.dtype) and not learns
    if not plain or torch.is_autocast_enabled(x.device.type) or kept.sources != _places(layer):
        return None
    return _one_row(x, kept.coded, kept.step, bias)


def _places(layer: Any) -> tuple[Any, ...]:
    """Others where something was written to the scale, or codes or scale were replaced."""
    codes, scale = layer.weight_codes, layer.weight_scale
    return codes.data_ptr(), scale.data_ptr(), None if scale.is_inference() else scale._version, scale.requires_grad


def _one_row(x: Tensor, coded: Any, step: Tensor, bias: Tensor | None) -> Tensor:
    return one_row(x.reshape(1, -1), coded, step, bias).view(*x.shape[:-1], -1)


def _step(coded: Any) -> Tensor:
    """By which two codes differ, float32, of the shape of the scale."""
    step: Tensor = coded.scale.detach().to(torch.float32).abs() / center(coded.bits, coded.grid)
    return step


def one_row(x: Tensor, coded: Any, step: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for one row of inputs, shape (1, columns), with weights and sums in float32. bias: shape (rows,)."""
    if x.is_cuda and not torch.compiler.is_compiling():
        from . import triton_kernels

        return triton_kernels.one_row(x.detach(), coded, step, center(coded.bits, coded.grid), bias)
    output = (_values(coded, step) * x.float()).sum(1)
    return (output if bias is None else output + bias.float()).to(x.dtype)[None]


def serves_row(layer: Any, x: Tensor) -> bool:
    """Whether a layer computes this input by `one_row`."""
    bias, shape = layer.bias, layer.shape
    learned = (x, layer.weight_scale, bias)
    return (
        len(shape) == 2
        and layer.a_quant is None
        and x.numel() == shape[1] == x.shape[-1]
        and shape[1] % 8 == 0 == (layer.group_size or 0) % 8
        and layer.weight_grid != "ternary"
        and x.device == layer.weight_codes.device
        and (bias is None or bias.dtype == x.dtype)
        and not torch.is_autocast_enabled(x.device.type)
        and not (torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in learned))
        and _serves(layer.coded(), x.dtype)
        and (torch.compiler.is_compiling() or _row_works(layer.coded(), x.dtype))
    )


def _serves(coded: Any, dtype: torch.dtype) -> bool:
    count, stream = math.prod(coded.shape), coded.stream
    if not _SMALL < count < _MANY or dtype not in _ROUNDING:
        return False
    if torch.compiler.is_compiling():
        known: bool = in_graph()
        return known
    fits = stream.numel() == packed_size(count, stored_bits(coded.bits, coded.grid))
    return (
        fits
        and type(stream) is Tensor
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(stream)
        and _works(coded, dtype)
    )


def _values(coded: Any, step: Tensor) -> Tensor:
    """The weight in float32, shape (rows, columns)."""
    rows, columns = coded.shape[0], coded.columns()
    row, column = (torch.arange(size, dtype=torch.int32, device=step.device) for size in (rows, columns))
    row = row[:, None]
    codes = _codes(coded.stream, row * columns + column, stored_bits(coded.bits, coded.grid))
    if len(step) > 1:
        step = _at(step, row * (len(step) // rows) + column // (coded.group_size or columns))
    return (codes.float() - center(coded.bits, coded.grid)) * step


def _codes(stream: Tensor, place: Tensor, bits: float) -> Tensor:
    """int32. place: of each code in the stream."""
    if bits == TERNARY:
        digits = _at(stream, place // 5).int()
        for before in range(1, 5):
            digits = torch.where(place % 5 >= before, digits // 3, digits)
        return digits % 3
    bits = int(bits)
    start = (place & 7) * bits
    byte, shift = (place >> 3) * bits + (start >> 3), start & 7
    code: Tensor = _at(stream, byte).int() >> shift
    if 8 % bits:  # some lie in two bytes
        code = code | _at(stream, (byte + 1).clamp(max=stream.shape[0] - 1)).int() << 8 - shift
    found: Tensor = code & 2**bits - 1
    return found


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Those at places inside, which nobody checks again."""
    found: Tensor = torch.ops.aten._unsafe_index(values, [places])
    return found


def _works(coded: Any, dtype: torch.dtype) -> bool:
    """Whether kernels can be compiled, and gave what torch gives for the first weight of this kind."""
    device = coded.stream.device
    if not kernels.available(device.type):
        return False
    sample = _Sample(coded, dtype)
    kind = coded.bits, coded.grid, coded.granularity(), coded.columns() % 8 == 0, dtype, device
    return agrees(("weights", *kind), sample.weight, sample.expected_weight, 0.0, "a kernel of weights")


def _row_works(coded: Any, dtype: torch.dtype) -> bool:
    """The same of `one_row`."""
    sample, group_size = _Sample(coded, dtype), coded.group_size
    kind = "row", coded.bits, coded.grid, coded.granularity(), group_size, dtype, coded.stream.device
    return agrees(kind, sample.outputs, sample.expected_outputs, _ROUNDING[dtype], "a kernel of codes")


class _Sample(NamedTuple):
    """The codes of a layer, with scales of 1, whatever its own are."""

    coded: Any
    dtype: torch.dtype

    def ones(self) -> Any:
        return self.coded._replace(scale=torch.ones_like(self.coded.scale))

    def inputs(self) -> Tensor:
        columns, device = self.coded.columns(), self.coded.stream.device
        return torch.linspace(-1, 1, columns, device=device).to(self.dtype)[None]

    def weight(self) -> Tensor:
        return _computed(self.ones(), self.dtype)

    def expected_weight(self) -> Tensor:
        expected: Tensor = self.ones().weight_of(self.coded.codes(), self.dtype)
        return expected

    def outputs(self) -> Tensor:
        ones = self.ones()
        return one_row(self.inputs(), ones, _step(ones), None)[0, :_FEW_OUTPUTS]

    def expected_outputs(self) -> Tensor:
        weight = self._replace(dtype=torch.float32).expected_weight().flatten(1)[:_FEW_OUTPUTS]
        return (weight.double() * self.inputs().double()).sum(1)


# ------------------------------------------------------------------------------------------------------ 4 bits, rounded


class Int4(NamedTuple):
    """A weight of up to 4 bits for torch's kernel, `(code - 8) * scale + zero`.

    sources: tells whether codes and scale still are what this was made of. weight: in the layout of the kernel; None where it
    does not serve. scale_and_zero: bfloat16, shape (in / group_size, out, 2).
    """

    sources: tuple[Any, ...]
    weight: Any = None
    scale_and_zero: Any = None
    group_size: int = 0


def serves_int4(layer: Any, x: Tensor) -> bool:
    if not layer.fast or layer.a_quant is not None or len(layer.shape) != 2 or layer.weight_bits > 4:
        return False
    bias, columns = layer.bias, layer.shape[1]
    learned = (x, layer.weight_scale, bias)
    return (
        used(x)
        and x.dtype == torch.bfloat16
        and x.shape[-1] == columns
        and 0 < x.numel() <= _INT4_ROWS * columns
        and x.device == layer.weight_codes.device
        and (bias is None or bias.dtype == x.dtype)
        and not torch.is_autocast_enabled(x.device.type)
        and not (torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in learned))
        and (_known_int4(layer) if torch.compiler.is_compiling() else _has_int4(layer))
    )


def _known_int4(layer: Any) -> bool:
    """In a graph: found while it is made; where `is_exporting` says so in every graph, in a forward before."""
    if not torch.compiler.is_exporting():
        found: bool = _has_int4(layer)
        return found
    if not in_graph():
        return False
    kept: Int4 | None = layer._int4
    return kept is not None and kept.weight is not None


def int4_forward(layer: Any, x: Tensor) -> Tensor:
    return _int4_product(x, layer._int4, layer.bias)


@torch._dynamo.assume_constant_result  # type: ignore[attr-defined]
def _has_int4(layer: Any) -> bool:
    kept: Int4 | None = layer.__dict__.get("_int4")
    tensors = layer.weight_codes, layer.weight_scale
    sources = tuple((part.data_ptr(), None if part.is_inference() else part._version) for part in tensors)
    if kept is None or kept.sources != sources:
        with torch.inference_mode(False), torch.no_grad():
            kept = layer._int4 = _int4(layer.coded(), sources)
    return kept.weight is not None


def _int4(coded: Any, sources: tuple[Any, ...]) -> Int4:
    outputs, columns = coded.shape
    sizes = [size for size in (256, 128, 64, 32) if columns % size == 0 and size == (coded.group_size or size)]
    if not sizes or outputs % 16:
        return Int4(sources)
    size, zero = sizes[0], center(coded.bits, coded.grid)
    scale = (coded.scale.float().abs() / zero).view(-1, columns // size if coded.group_size else 1)
    scale = scale.expand(outputs, columns // size)
    pair = torch.stack([scale, scale * (8 - zero)], -1).transpose(0, 1).contiguous().to(torch.bfloat16)

    def found() -> Tensor:
        return _int4_product(x, kept, None)

    def expected() -> Tensor:
        return F.linear(x.double(), coded.weight_of(codes, torch.bfloat16).double())

    codes = coded.codes()
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(0), device="cpu").to(
        codes.device, torch.bfloat16
    )
    try:
        kept = Int4(sources, _int4_layout(codes, columns), pair, size)
    except RuntimeError:  # this GPU has no such kernel
        return Int4(sources)
    kind = "int4", coded.bits, coded.grid, coded.granularity(), size, codes.device
    return kept if agrees(kind, found, expected, 2**-6, "a kernel of 4-bit weights") else Int4(sources)


def _int4_layout(codes: Tensor, columns: int) -> Tensor:
    if codes.is_cpu:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)  # type: ignore[no-any-return]
    tiles = next(count for count in (8, 4, 2) if columns % (16 * count) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], tiles)  # type: ignore[no-any-return]


def _int4_product(x: Tensor, kept: Int4, bias: Tensor | None) -> Tensor:
    ops = torch.ops.aten
    operator = ops._weight_int4pack_mm_for_cpu if x.is_cpu else ops._weight_int4pack_mm
    output = operator(x.reshape(-1, x.shape[-1]).contiguous(), kept.weight, kept.group_size, kept.scale_and_zero)
    output = output if bias is None else output + bias
    return output.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
