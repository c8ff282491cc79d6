"""Where and how the formula runs: compiled by torch's inductor, as one pass over memory; or eagerly, where nothing can be
compiled or it does not pay. On the CPU both give the same values, bit for bit; gradients differ in the last bits.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .formula import (
    Constants,
    Learned,
    Rows,
    Soft,
    gradient_of_rows,
    gradients,
    quantize,
    quantize_rows,
    round_half_down_,
    rows_of,
)

logger = logging.getLogger("hf_daq")
_FEW, _MANY = 2**15, 2**31  # elements between which tensors go to a compiled kernel
_FEW_CODES = 2**12  # of those whose codes are wanted: a kernel that returns one tensor starts sooner
_FEW_ON_GPU = 2**6  # one kernel starts sooner than the forty of the eager form
_said: list[str] = []


@cache
def available(device_type: str) -> bool:
    """Whether kernels for this device can be compiled here: never on Windows, nor with `HF_DAQ_COMPILE=0`."""
    if os.environ.get("HF_DAQ_COMPILE", "1") == "0" or sys.platform == "win32":
        return False
    if device_type == "cuda":
        return find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)
    return device_type == "cpu" and compiler() is not None


def compiler() -> str | None:
    """Path of a compiler of C++, None where there is none."""
    found = (shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    return next((path for path in found if path), None)


class Kernels:
    """Compiles `function` once for each combination of constants, dtypes, devices and numbers of dimensions; the code
    serves all sizes, and is kept on disk.

    It is called without `torch.compile`, whose guards take longer than the kernel of a small layer. So nobody checks
    that later tensors are like those it was compiled for. They must be contiguous and have less than 2**31 elements, and
    sizes must be above 1 where those of `shapes` are. Code for the CPU has room for the sums of as many threads as there are
    when it is compiled: for another number it is compiled anew.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.found: dict[Any, Callable[..., Any]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], constants: tuple[Any, ...], shapes: tuple[Any, ...]) -> Any:
        """`function(*tensors, *constants)`.

        Args:
            shapes: of tensors to compile with, all different where sizes may differ.
        """
        threads = torch.get_num_threads()
        key = (*constants, *shapes, *(tensor.dtype for tensor in tensors), tensors[0].device, threads)
        kernel = self.found.get(key)
        if kernel is None:
            kernel = self.found[key] = self._compiled(tensors, constants, shapes)
        return kernel(*tensors)

    def _compiled(
        self, tensors: tuple[Tensor, ...], constants: tuple[Any, ...], shapes: tuple[Any, ...]
    ) -> Callable[..., Any]:
        def function(*tensors: Tensor) -> Any:
            return self.function(*tensors, *constants)

        say("compiling quantizers: some seconds now, less the next time; HF_DAQ_COMPILE=0 does without")
        # Where CUDA_HOME is set without a GPU it would say that there is none.
        logging.getLogger("torch.utils.cpp_extension").addFilter(_no_cuda)
        try:
            import torch._inductor  # not before it is needed: this takes a second or two
            from torch.fx.experimental.proxy_tensor import make_fx

            examples: list[Any] = [tensor.new_empty(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
            with torch.autocast(tensors[0].device.type, enabled=False):
                graph = make_fx(function, tracing_mode="symbolic")(*examples)
                # Precompiled headers cost more than they save a handful of kernels.
                options = {"config_patches": {"cpp_cache_precompile_headers": False}}
                compiled: Callable[..., Any] = torch._inductor.standalone_compile(graph, examples, options=options)
            compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"quantizers are not compiled, and slower for it: {reason}")
            return function
        return compiled


def _no_cuda(record: logging.LogRecord) -> bool:
    """False for a remark that there is no GPU."""
    return "No CUDA runtime" not in record.getMessage()


def say(text: str) -> None:
    """Tell the user once in this process, and on one process of a machine."""
    if text not in _said and os.environ.get("LOCAL_RANK", "0") == "0":
        _said.append(text)
        logger.warning(text)


def _forward(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    scale: Any,
    offset: Any,
    unit: Any,
    constants: Any,
    soft: Soft,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The quantized tensor, and its `Rows` stacked for `_backward`."""
    constants = _named(constants)
    stack = torch.stack(rows_of(lower, upper, scale, offset, unit, constants))
    return quantize(x, Rows(*_beside(stack, x).unbind()), constants, soft, dtype), stack


def _backward(
    x: Tensor, grad: Tensor, stack: Tensor, constants: Any, rounding: str, soft: Soft, needs_outer: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and `Learned` stacked."""
    rows, broadcast = Rows(*stack.unbind()), Rows(*_beside(stack, x).unbind())
    of_x, learned = gradients(x, grad, rows, broadcast, _named(constants), rounding, soft, needs_outer)
    return of_x, torch.stack(learned)


def _named(constants: Any) -> Constants:
    """A compiled kernel gets them as one tensor."""
    return Constants(*constants.unbind()) if isinstance(constants, Tensor) else constants


def _beside(stack: Tensor, x: Tensor) -> Tensor:
    """Each row, broadcastable to x."""
    return stack if stack.shape[1] == 1 else stack.view(*stack.shape, *(1,) * (x.ndim - 1))


_forward_kernels, _backward_kernels = Kernels(_forward), Kernels(_backward)


def run_forward(
    x: Tensor, values: tuple[Any, ...], constants: Constants, soft: Soft, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`_forward`, compiled where it pays. `values`: lower, upper, scale, offset, unit."""
    if not _compiles(x, values[0], soft):
        lower, upper, scale, offset, unit = values
        return _forward(x, lower, upper, scale, offset, unit, constants, soft, dtype)
    layout = _Layout(x, values[0].numel())
    absent = _on((1.0,), x.device)
    present = (absent if value is None else value for value in values)
    tensors = layout.flat(x), *present, _on(constants, x.device)
    flat, stack = _forward_kernels(tensors, (None, dtype), layout.shapes("x", "row", "row", "row", "row", "row"))
    return layout.unflat(flat), stack


def run_backward(
    x: Tensor, grad: Tensor, stack: Tensor, constants: Constants, rounding: str, soft: Soft, needs_outer: bool
) -> tuple[Tensor, Learned]:
    """`_backward`, compiled where it pays."""
    if not _compiles(x, stack, soft):
        of_x, learned = _backward(x, grad, stack, constants, rounding, soft, needs_outer)
        return of_x, Learned(*learned.unbind())
    layout = _Layout(x, stack.shape[1])
    tensors = layout.flat(x), layout.flat(grad), stack, _on(constants, x.device)
    # The outer sum, wanted or not: it costs little in the same pass, and one kernel serves all.
    flat, learned = _backward_kernels(tensors, (rounding, None, True), layout.shapes("x", "x", "rows"))
    return layout.unflat(flat), Learned(*learned.unbind())


def _codes(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    start, inverse, first, last = rows.unbind()
    wide = x.to(rows.dtype)
    v = torch.sub(wide, start).mul_(inverse).clamp_(first, last)
    return round_half_down_(v).to(torch.uint8), (wide != wide).any()


_codes_kernels = Kernels(_codes)


def run_codes(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of inputs, uint8 of their shape, and whether any is NaN, whose code means nothing. No gradient.

    Args:
        rows: shape (4,): `start` and `inverse` of `formula.activation_rows`, 0 and the last code.
    """
    if not _compiles(x, rows, None, few=_FEW_CODES):
        return _codes(x.detach(), rows)
    layout = _Layout(x, 1)
    codes, has_nan = _codes_kernels((layout.flat(x.detach()), rows), (), (_PER_TENSOR["x"], rows.shape))
    return layout.unflat(codes), has_nan


def _rows_forward(x: Tensor, scale: Tensor, inverse: Tensor, constants: Any, soft: Soft, dtype: torch.dtype) -> Tensor:
    return quantize_rows(x, scale, inverse, _named(constants), soft, dtype)


def _rows_backward(x: Tensor, grad: Tensor, inverse: Tensor, constants: Any, soft: Soft) -> Tensor:
    return gradient_of_rows(x, grad, inverse, _named(constants), soft)


_rows_forward_kernels, _rows_backward_kernels = Kernels(_rows_forward), Kernels(_rows_backward)


def run_rows_forward(x: Tensor, scale: Tensor, constants: Constants, soft: Soft, dtype: torch.dtype) -> Tensor:
    """`quantize_rows`, compiled where it pays."""
    if not _compiles_rows(x, soft):
        return quantize_rows(x, scale, 1 / scale, constants, soft, dtype)
    rows, scale = x.contiguous().view(-1, x.shape[-1]), scale.reshape(-1, 1)
    tensors = rows, scale, 1 / scale, _on(constants, x.device)
    result: Tensor = _rows_forward_kernels(tensors, (None, dtype), (_PER_ROW["x"], _SCALE, _SCALE, _CONSTANTS))
    return result.view(x.shape)


def run_rows_backward(
    x: Tensor, grad: Tensor, scale: Tensor, constants: Constants, rounding: str, soft: Soft
) -> Tensor:
    """`gradient_of_rows`, compiled where it pays."""
    if rounding == "ste":
        return grad.to(x.dtype)
    if not _compiles_rows(x, soft):
        return gradient_of_rows(x, grad, 1 / scale, constants, soft)
    rows, grad = (value.contiguous().view(-1, x.shape[-1]) for value in (x, grad))
    tensors = rows, grad, 1 / scale.reshape(-1, 1), _on(constants, x.device)
    shapes = _PER_ROW["x"], _PER_ROW["x"], _SCALE, _CONSTANTS
    result: Tensor = _rows_backward_kernels(tensors, (None,), shapes)
    return result.view(x.shape)


def _compiles_rows(x: Tensor, soft: Soft) -> bool:
    columns = x.shape[-1]
    return 1 < columns < x.numel() and x.dtype != torch.float64 and _compiles(x, _on((1.0,), x.device), soft)


def _compiles(x: Tensor, value: Tensor, soft: Soft, few: int | None = None) -> bool:
    """Whether the compiled kernels serve: many elements and float32 arithmetic. In somebody else's compilation the eager
    form fuses with its neighbours, and a trace shows it."""
    few = _FEW if few is None else few
    return (
        not torch.compiler.is_compiling()
        and soft is None
        and (min(few, _FEW_ON_GPU) if x.is_cuda else few) < x.numel() < _MANY
        and (value.shape[-1] == 1 or value.shape[-1] < x.numel())
        and value.dtype == torch.float32
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
        and available(x.device.type)
    )


class _Layout:
    """A dense tensor as its elements lie in memory: shape (numel,), or (rows, numel / rows) with bounds for each row."""

    def __init__(self, x: Tensor, bounds: int) -> None:
        self.per_row = bounds > 1
        self.shape = (len(x), -1) if self.per_row else (-1,)
        self.order = None
        self.ordered = x.shape
        if not x.is_contiguous():
            strides = x.stride()
            self.order = sorted(range(x.ndim), key=lambda dim: (dim > 0 or not self.per_row, -strides[dim], dim))
            self.ordered = torch.Size(x.shape[dim] for dim in self.order)

    def flat(self, tensor: Tensor) -> Tensor:
        """The elements in this order; copied if they lie in another one, or with gaps."""
        return (tensor if self.order is None else tensor.permute(self.order)).contiguous().view(self.shape)

    def unflat(self, flat: Tensor) -> Tensor:
        tensor = flat.view(self.ordered)
        if self.order is None:
            return tensor
        return tensor.permute(sorted(range(len(self.order)), key=self.order.__getitem__))

    def shapes(self, *names: str) -> tuple[tuple[int, ...], ...]:
        """Of tensors and the constants, to compile with: no two sizes by chance equal."""
        shapes = _PER_ROW if self.per_row else _PER_TENSOR
        return (*(shapes[name] for name in names), _CONSTANTS)


_FIELDS = len(Rows._fields)
_PER_TENSOR: dict[str, tuple[int, ...]] = {"x": (2**20 - 3,), "row": (1,), "rows": (_FIELDS, 1)}
_PER_ROW: dict[str, tuple[int, ...]] = {"x": (521, 1031), "row": (521,), "rows": (_FIELDS, 521)}
_SCALE, _CONSTANTS = (521, 1), (len(Constants._fields),)


@cache
def _on(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
