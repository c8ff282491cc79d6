"""What is computed from the codes of a packed weight: by native.cpp where it can be compiled, else in torch.

`hf_daq::packed_linear` is an operator of torch: one node in a graph of `torch.export` or `torch.compile`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..config import stored_bits
from . import gpu
from .bitpack import pack_bits, packed_size, unpack_bits
from .formula import center
from .functional import dequantize_weight
from .native import library
from .trust import agrees

_SMALL = 2**14  # weights up to which nothing is compiled: torch is as fast
_ROWS = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 16}
"""Of inputs, up to which the product reads codes; with more, a product of floats is faster."""
_TILE = 2**22  # bytes of float weights that stay in the cache
_PART = 2**20  # weights
_PER_THREAD = 2**17  # weights that are worth a thread
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_forked: list[bool] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


class Coded(NamedTuple):
    """A weight in codes.

    stream: uint8, as `bitpack` writes it, three values in 1.6 bits. scale, bits, grid, group_size: as for `dequantize_weight`.
    shape: of the weight, (out, ...).
    """

    stream: Tensor
    scale: Tensor
    bits: int
    grid: str
    group_size: int | None
    shape: tuple[int, ...]

    def codes(self) -> Tensor:
        """uint8, of this shape."""
        count = math.prod(self.shape)
        if not self._readable(torch.float32):
            return unpack_bits(self.stream, stored_bits(self.bits, self.grid), count).view(self.shape)
        stream = _placed(self).arguments[:3]
        codes = torch.empty(self.shape, dtype=torch.uint8)
        _call("daq_read_codes", *stream, codes.data_ptr(), count)
        return codes

    def weight(self, dtype: torch.dtype) -> Tensor:
        """As from `dequantize_weight`, bit for bit."""
        computed = gpu.weights(self, dtype) if gpu.used(self.stream) else None
        if computed is not None:
            return computed
        if self._readable(dtype):
            return native_rows(self, 0, self.shape[0], dtype).view(self.shape)
        return self.weight_of(self.codes(), dtype)

    def parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """`weight`, some rows after the other where native.cpp reads them; else all of them at once."""
        rows = max(1, _PART // self.columns())
        if not self._readable(dtype):
            yield self.weight(dtype)
            return
        for first in range(0, self.shape[0], rows):
            part = native_rows(self, first, min(first + rows, self.shape[0]), dtype)
            yield part.view(-1, *self.shape[1:])

    def weight_of(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that these codes mean, computed by torch."""
        options: dict[str, Any] = {"bits": self.bits, "grid": self.grid, "group_size": self.group_size}
        return dequantize_weight(codes, self.scale, dtype=dtype, **options)

    def granularity(self) -> str:
        return "group" if self.group_size else "tensor" if self.scale.numel() == 1 else "channel"

    def columns(self) -> int:
        return math.prod(self.shape[1:])

    def _readable(self, dtype: torch.dtype) -> bool:
        """Whether native.cpp can read these bytes, and nobody records what is done with them."""
        return (
            math.prod(self.shape) > _SMALL and in_memory(self.stream) and in_memory(self.scale) and _works(self, dtype)
        )


def encode(codes: Tensor, bits: int, grid: str = "odd") -> Tensor:
    """As `pack_bits`, bit for bit."""
    if codes.numel() <= _SMALL or not in_memory(codes) or not works(bits, grid, "tensor", torch.float32):
        return pack_bits(codes, stored_bits(bits, grid))
    codes = codes.contiguous()
    stream = torch.empty(packed_size(codes.numel(), bits), dtype=torch.uint8)
    _call("daq_write_codes", codes.data_ptr(), bits, stream.data_ptr(), codes.numel())
    return stream


def in_memory(tensor: Tensor) -> bool:
    """Whether there are bytes of the CPU behind this tensor, and no graph is made of what happens to it."""
    return tensor.is_cpu and at_hand(tensor)


def at_hand(tensor: Tensor) -> bool:
    """Whether there are bytes behind this tensor, and no graph is made of what happens to it."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and _get_current_dispatch_mode() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


# ------------------------------------------------------------------------------------------------- calls of native.cpp


def _call(name: str, *arguments: Any) -> None:
    if getattr(library(), name)(*arguments):
        raise MemoryError(f"no memory for {name}")


class _Placed(NamedTuple):
    """A weight and the arguments of native.cpp that say where it is.

    scale: float32, to which they point. sources: of `_sources`. dtypes: of inputs for which native.cpp gave what torch gives.
    """

    coded: Coded
    arguments: tuple[Any, ...]
    scale: Tensor
    sources: tuple[int, ...]
    dtypes: set[torch.dtype]


def _sources(stream: Tensor, scale: Tensor) -> tuple[int, ...]:
    return stream.data_ptr(), stream.numel(), scale.data_ptr(), scale.numel()


def _placed(coded: Coded) -> _Placed:
    stream, scale, bits, grid, group_size, (rows, *_) = coded
    columns, per_row, per_group = coded.columns(), int(scale.numel() > 1), 0
    if group_size:
        per_row, per_group = -(-columns // group_size), 1
    fits = stream.numel() == packed_size(rows * columns, bits) and scale.numel() == max(1, rows * per_row)
    if not (fits and stream.is_cpu and scale.is_cpu and stream.dtype == torch.uint8 and stream.is_contiguous()):
        raise ValueError(
            f"{stream.numel()} bytes of codes and {scale.numel()} scales are not those of a weight of {bits} bits, of the "
            f"shape {tuple(coded.shape)}, with a group_size of {group_size}"
        )
    wide = scale.to(torch.float32).contiguous()
    place = stream.data_ptr(), stream.numel(), bits, center(bits, grid), wide.data_ptr()
    return _Placed(coded, (*place, per_row, per_group), wide, _sources(stream, scale), set())


def threads(weights: int) -> int:
    """How many work on so many weights."""
    return 1 if _forked else min(torch.get_num_threads(), 1 + weights // _PER_THREAD)


def native_rows(coded: Coded, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows of the weight, shape (last - first, columns)."""
    columns, wide = coded.columns(), dtype if dtype in _KINDS else torch.float32
    result = torch.empty(last - first, columns, dtype=wide)
    placed = _placed(coded)
    group, number = coded.group_size or columns, threads(result.numel())
    _call("daq_weights", *placed.arguments, columns, group, first, last, result.data_ptr(), _KINDS[wide], number)
    return result.to(dtype)


def native_product(x: Tensor, placed: _Placed, bias: Tensor | None) -> Tensor:
    """x: shape (count, columns), float32 or bfloat16. bias: of the same dtype."""
    coded = placed.coded
    rows, columns = coded.shape
    x, count = x.contiguous(), len(x)
    result = torch.empty(count, rows, dtype=x.dtype)
    if bias is not None:
        if bias.shape != (rows,) or bias.dtype != x.dtype or not bias.is_cpu:
            raise ValueError(f"a bias of {bias.dtype} and shape {tuple(bias.shape)} for {rows} outputs of {x.dtype}")
        bias = bias.contiguous()
    last = 0 if bias is None else bias.data_ptr(), result.data_ptr(), _KINDS[x.dtype], threads(rows * columns)
    sizes = rows, columns, coded.group_size or columns
    _call("daq_linear", *placed.arguments, *sizes, x.data_ptr(), count, *last)
    return result


@cache
def works(bits: int, grid: str, granularity: str, dtype: torch.dtype) -> bool:
    """Whether native.cpp is there and gives, on a sample, what torch gives. It does not read codes in base 3."""
    if dtype not in (*_KINDS, torch.float16) or grid == "ternary" or library() is None:
        return False
    wide = dtype if dtype in _KINDS else torch.float32
    sample = _Sample(bits, grid, granularity, wide)
    return agrees(sample, sample.found, sample.expected, 1e-6 if wide == torch.float32 else 2**-8, "a kernel of codes")


class _Sample(NamedTuple):
    """A small weight of this kind, whose last group is shorter, and products with 1, 2, 4 and 8 rows of inputs."""

    bits: int
    grid: str
    granularity: str
    dtype: torch.dtype

    def _values(self) -> tuple[Tensor, Coded, Tensor, Tensor]:
        generator, (rows, columns, size) = torch.Generator().manual_seed(0), (3, 203, 72)
        codes = torch.randint(2**self.bits, (rows, columns), dtype=torch.uint8, generator=generator)
        count = {"tensor": 1, "channel": rows, "group": rows * -(-columns // size)}[self.granularity]
        scale = torch.rand(count, generator=generator, dtype=torch.float32) + 0.1
        x = torch.randn(15, columns, generator=generator, dtype=torch.float32)
        group_size = size if self.granularity == "group" else None
        coded = Coded(pack_bits(codes, self.bits), scale, self.bits, self.grid, group_size, (rows, columns))
        return codes, coded, x.to(self.dtype), torch.ones(rows, dtype=self.dtype)

    def found(self) -> Tensor:
        codes, coded, x, bias = self._values()
        stream, read = torch.empty_like(coded.stream), torch.empty_like(codes)
        _call("daq_write_codes", codes.data_ptr(), self.bits, stream.data_ptr(), codes.numel())
        _call("daq_read_codes", stream.data_ptr(), stream.numel(), self.bits, read.data_ptr(), codes.numel())
        weight = native_rows(coded, 0, len(codes), self.dtype)
        if not (
            torch.equal(codes, read)
            and torch.equal(stream, coded.stream)
            and torch.equal(weight, coded.weight_of(codes, self.dtype))
        ):
            raise ArithmeticError("other codes")
        return torch.cat([native_product(part, _placed(coded), bias) for part in torch.split(x, [8, 4, 2, 1])])

    def expected(self) -> Tensor:
        codes, coded, x, bias = self._values()
        return F.linear(x.double(), coded.weight_of(codes, torch.float64), bias.double())


# -------------------------------------------------------------------------------------------------------- the operator


@torch.library.custom_op("hf_daq::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    grid: str,
    group_size: int | None,
    rows: int,
) -> Tensor:
    """`F.linear` with a weight in codes: sums in float32, and weights too unless there are many rows of bfloat16.

    Args:
        x: float32, bfloat16 or float16, shape (..., columns). bias: of the same dtype, shape (rows,).
        codes, scale, bits, grid, group_size: as for `Coded`.

    Returns:
        Of the dtype of x, shape (..., rows).
    """
    with torch.autocast(x.device.type, enabled=False):
        coded = Coded(codes, scale, bits, grid, group_size, (rows, x.shape[-1]))
        if x.is_cpu and _works(coded, x.dtype):
            return _product(x, _placed(coded), bias)
        return F.linear(x, coded.weight(x.dtype), bias)


def _works(coded: Coded, dtype: torch.dtype) -> bool:
    return works(coded.bits, coded.grid, coded.granularity(), dtype)


def _product(x: Tensor, placed: _Placed, bias: Tensor | None) -> Tensor:
    coded = placed.coded
    flat = x.reshape(-1, coded.shape[1])
    if len(flat) == 0:
        result = F.linear(flat, coded.weight(x.dtype), bias)
    elif len(flat) > _ROWS[x.dtype]:
        result = _tiled(flat, coded, bias)
    elif x.dtype == torch.float16:
        result = native_product(flat.float(), placed, None if bias is None else bias.float()).half()
    else:
        result = native_product(flat, placed, bias)
    return result.view(*x.shape[:-1], coded.shape[0])


def _tiled(x: Tensor, coded: Coded, bias: Tensor | None) -> Tensor:
    """The product of floats with some rows of the weight after the other, which stay in the cache."""
    rows, columns = coded.shape
    parts = -(-rows * columns * x.itemsize // _TILE)
    size = -(-rows // (16 * parts)) * 16
    result = x.new_empty(len(x), rows)
    for first in range(0, rows, size):
        last = min(first + size, rows)
        part = None if bias is None else bias[first:last]
        result[:, first:last] = F.linear(x, native_rows(coded, first, last, x.dtype), part)
    return result


@packed_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Any, bits: int, grid: str, group_size: Any, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, _, *ctx.options, rows = inputs
    ctx.shape = rows, x.shape[-1]
    ctx.save_for_backward(codes, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs_x, _, _, needs_bias, *_ = ctx.needs_input_grad
    (codes, scale), (bits, grid, group_size) = ctx.saved_tensors, ctx.options
    coded = Coded(codes, scale, bits, grid, group_size, ctx.shape)
    of_x = grad @ coded.weight(grad.dtype) if needs_x else None
    of_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
    return of_x, None, None, of_bias, None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_setup)


@packed_linear.register_vmap
def _(info: Any, dims: tuple[Any, ...], x: Tensor, *others: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in dims[1:]):
        raise NotImplementedError("torch.func.vmap over the weights of packed layers; first write hf_daq.unpack(model)")
    return packed_linear(x.movedim(dims[0], 0), *others), 0


# ------------------------------------------------------------------------------------------------------------ the path


def serves(layer: Any, x: Tensor) -> bool:
    """Whether a packed layer computes from its codes: linear ones with weights only, but for small ones; on a GPU with one row
    of inputs."""
    if gpu.used(x):
        return gpu.serves_row(layer, x)
    shape = layer.shape
    if len(shape) != 2 or shape[0] * shape[1] <= _SMALL or layer.a_quant is not None:
        return False
    bias, dtype = layer.bias, _computed_dtype(x)
    return (
        x.device.type == "cpu"
        and x.ndim > 0
        and x.shape[-1] == shape[1]
        and dtype in _ROWS
        and (bias is None or bias.dtype == dtype or torch.is_autocast_enabled("cpu"))
        and layer.weight_codes.device.type == "cpu"
        and not layer.weight_scale.requires_grad
        and (_is_in_graph() if torch.compiler.is_compiling() else _is_at_hand())
    )


@torch.compiler.assume_constant_result
def _is_in_graph() -> bool:
    return _is_at_hand() and not torch.onnx.is_in_onnx_export()


def _is_at_hand() -> bool:
    """Not in a graph of torch.jit or ONNX, which has no place for an operator of others."""
    return library() is not None and not torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]


def _computed_dtype(x: Tensor) -> torch.dtype:
    """What `F.linear` computes in: under autocast another one than that of its input."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def forward(layer: Any, x: Tensor) -> Tensor:
    if gpu.used(x):
        return gpu.row_forward(layer, x)
    dtype, bias, autocast = _computed_dtype(x), layer.bias, torch.is_autocast_enabled("cpu")
    if autocast:
        x, bias = x.to(dtype), bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if not learns and not autocast and in_memory(x):
        kept = _kept(layer, x.dtype)
        if kept is not None:
            return _product(x, kept, bias)  # what the operator does, without its way through torch
    coded = layer.coded()
    result: Tensor = packed_linear(x, *coded[:2], bias, *coded[2:5], coded.shape[0])
    return result


def at_once(layer: Any, x: Tensor) -> Tensor | None:
    """The output of a layer that computed from its codes before, where nothing but numbers is asked for; else None."""
    if torch.compiler.is_compiling():
        return None
    if gpu.used(x):
        return gpu.at_once(layer, x) if x.ndim > 0 and at_hand(x) else None
    kept: _Placed | None = layer.__dict__.get("_placed")
    if kept is None or x.dtype not in kept.dtypes or x.ndim == 0 or x.shape[-1] != kept.coded.shape[1]:
        return None
    bias, learned = layer.bias, (x, layer.weight_scale, layer.bias)
    learns = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in learned)
    plain = not torch.is_autocast_enabled("cpu") and (bias is None or bias.dtype == x.dtype)
    same = kept.sources == _sources(layer.weight_codes, layer.weight_scale)
    return _product(x, kept, bias) if plain and same and not learns and in_memory(x) else None


def _kept(layer: Any, dtype: torch.dtype) -> _Placed | None:
    """Kept by the layer as long as its codes and scale lie there; None where native.cpp does not compute with them."""
    stream, scale = layer.weight_codes, layer.weight_scale
    kept: _Placed | None = layer.__dict__.get("_placed")
    if kept is None or kept.sources != _sources(stream, scale):
        coded = layer.coded()
        if not _works(coded, dtype):
            return None
        kept = _placed(coded)
        if kept.scale is scale:  # no copy, which would not see what is written to the scale
            layer._placed = kept
    if dtype not in kept.dtypes and _works(kept.coded, dtype):
        kept.dtypes.add(dtype)
    return kept if dtype in kept.dtypes else None
