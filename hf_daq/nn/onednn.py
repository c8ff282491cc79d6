"""Packed layers with quantized inputs in whole numbers: on the CPU by integers.cpp (whole.py), else oneDNN's operators in torch;
linear ones on a GPU by gpu.py. In graphs oneDNN comes first where it is faster: on a processor with AMX, and with VNNI for
convolutions of more than one pixel.

    output[c] = scale[c] * sum_i (code_i - zero_point) * weight[c, i] + bias[c]

(with a scale for each token: times that before the bias) with unsigned codes of the input and the integers of integers.py for
the weight, which fit int8 but for the odd ones of 8 bits. There the weight is `q - 128`, and as `2q - 255 = 2 (q - 128) + 1`,
half of the sum of the inputs is added.

The sums are exact where the processor adds products in 32 bits. Without VNNI instructions it adds pairs of them in 16
bits, and cuts off what is too large. So a layer goes this way only after its own weights gave the right sums for the
largest codes.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import gpu
from . import whole as machine
from .codes import at_hand
from .formula import activation_rows, center, constants_of
from .functional import refuse_second_derivative
from .kernels import run_codes
from .token import TokenQuantizer
from .trust import agrees

logger = logging.getLogger("hf_daq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ops: Any = torch.ops.onednn


class Prepared(NamedTuple):
    """What a layer computes with, made of its codes and bounds. It is kept beside them, and not saved.

    sources: tells whether these still are what it was made of.
    arranged: for integers.cpp; None where oneDNN computes.
    weight: in oneDNN's layout; None where the layer cannot go this way. scale: shape (out,), of the sums.
    ones: for odd integers of 8 bits a weight of ones, in this layout, one output a group.
    rows: shape (4,), as of `kernels.run_codes`; None where each token has a scale.
    int8: for gpu.py, which needs nothing else.
    """

    sources: tuple[Any, ...]
    arranged: machine.Arranged | None = None
    weight: Any = None
    scale: Any = None
    ones: Any = None
    rows: Any = None
    zero_point: int = 0
    int8: gpu.Int8 | None = None

    def computes(self, alone: bool = False) -> bool:
        return self.weight is not None or self.int8 is not None or (self.arranged is not None and not alone)


# ------------------------------------------------------------------------------------------------------------- which way


def serves(layer: Any, x: Tensor) -> bool:
    """Whether the layer computes with this input in whole numbers."""
    if layer.a_quant is None or layer.weight_codes.device != x.device or not _suits(layer, x):
        return False
    # integers.cpp finds scales of rows in float32 and bfloat16.
    alone = x.dtype == torch.float16 and isinstance(layer.a_quant, TokenQuantizer)
    if torch.compiler.is_compiling():
        known: bool = _is_prepared(layer, alone) if not torch.compiler.is_exporting() else _was_prepared(layer, x)
        return known
    return prepared(layer, alone).computes(alone)


def _suits(layer: Any, x: Tensor) -> bool:
    convolution = isinstance(layer, nn.Conv2d)
    if not (not convolution if gpu.used(x) else x.is_cpu) or x.dtype not in _DTYPES or x.numel() == 0:
        return False
    if convolution and x.ndim != 4:
        return False
    if torch.is_grad_enabled():
        quantizer, bias = layer.a_quant, layer.bias
        learned = [*quantizer._parameters.values(), *(() if bias is None else (bias,))]
        if any(value.requires_grad for value in learned):
            return False
        if x.requires_grad and (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)):
            return False
    return torch.compiler.is_compiling() or at_hand(x)


@torch._dynamo.assume_constant_result  # type: ignore[attr-defined]
def _is_prepared(layer: Any, alone: bool) -> bool:
    """As `prepared`, once while a model is compiled; the graph then has what the layer keeps."""
    pixels = isinstance(layer, nn.Conv2d) and layer.groups == 1 and max(layer.kernel_size) > 1
    alone = alone or (pixels and torch.cpu._is_vnni_supported()) or torch.cpu._is_amx_tile_supported()
    return prepared(layer, alone).computes(alone)


def _was_prepared(layer: Any, x: Tensor) -> bool:
    """On a GPU, whether a forward prepared the layer, where `is_exporting` says so in every graph."""
    if not gpu.used(x) or not gpu.in_graph():
        return False
    kept: Prepared | None = layer._prepared
    return kept is not None and kept.int8 is not None


def prepared(layer: Any, alone: bool = False) -> Prepared:
    """What the layer keeps, made anew where something was written to codes, scale or bounds.

    Args:
        alone: whether oneDNN computes, even if integers.cpp could.
    """
    kept: Prepared | None = layer.__dict__.get("_prepared")
    sources = _sources(layer)
    if kept is None or kept.sources != sources or (alone and kept.arranged is not None):
        with torch.inference_mode(False), torch.no_grad():
            kept = layer._prepared = _made(layer, sources, alone)
    return kept


def _sources(layer: Any) -> tuple[Any, ...]:
    quantizer, kept = layer.a_quant, [layer.weight_codes, layer.weight_scale]
    bounds = list(quantizer._parameters.values())
    if gpu.used(layer.weight_codes):  # where it takes long to read their values
        kept, values = kept + bounds, []
    else:
        values = [value.item() for value in bounds]
    versions = (None if tensor.is_inference() else tensor._version for tensor in kept)
    places = (tensor.data_ptr() for tensor in kept)
    return layer.weight_bits, layer.weight_grid, quantizer.bits, *values, *versions, *places


# ------------------------------------------------------------------------------------------------------------ preparing


def _made(layer: Any, sources: tuple[Any, ...], alone: bool) -> Prepared:
    if not _fits(layer):
        return Prepared(sources)
    quantizer, zero = layer.a_quant, center(layer.weight_bits, layer.weight_grid)
    between = zero % 1 != 0  # the center of odd integers lies between two codes
    halves = between and layer.weight_bits == 8
    per_code = 2 if between and not halves else 1
    whole = (layer.codes().to(torch.int16) * per_code - math.ceil(per_code * zero)).to(torch.int8)
    step = layer.weight_scale.double().abs() / (per_code * zero)
    if not isinstance(quantizer, TokenQuantizer):
        step = step / quantizer.levels
    scale = step.float().expand(len(whole)).contiguous()
    rows = _rounding(quantizer)
    if gpu.used(whole):
        int8 = gpu.int8(whole, scale, rows, quantizer.zero_point, halves)
        return Prepared(sources, int8=int8 if int8 is not None and _adds(layer, whole, int8) else None)
    if not alone:
        start, inverse = (0.0, 0.0) if rows is None else rows[:2].tolist()
        rounding = start, inverse, quantizer.levels
        arranged = machine.arrange(layer, whole, scale, halves, rounding, quantizer.zero_point, rows is None)
        if arranged is not None and _is_exact(layer, whole, halves):
            return Prepared(sources, arranged)
    try:
        ones = _packed(layer, torch.ones_like(whole[: getattr(layer, "groups", 1)])) if halves else None
        found = Prepared(sources, None, _packed(layer, whole), scale, ones, rows, quantizer.zero_point)
        exact = _sums_are_exact(layer, found, whole)
    except Exception as error:  # whatever an operator of this build cannot do
        exact = False
        logger.debug("%s", error)
    if not exact:
        _say_inexact()
    return found if exact else Prepared(sources)


def _rounding(quantizer: Any) -> Tensor | None:
    """As `kernels.run_codes` takes it; None where each token has a scale."""
    if isinstance(quantizer, TokenQuantizer):
        return None
    rows = activation_rows(quantizer.lower, quantizer.upper, constants_of(True, quantizer.bits, 1.0, 1.0))
    return torch.cat([rows.start, rows.inverse, rows.start.new_tensor([0, quantizer.levels])])


def _fits(layer: Any) -> bool:
    """Whether this is a layer that the operators know, with sums inside of 32 bits, and values for all that it has."""
    convolution = isinstance(layer, nn.Conv2d)
    if not convolution and len(layer.shape) != 2:
        return False  # convolutions of other kinds
    operator = "qconv2d_pointwise" if convolution else "qlinear_pointwise"
    if layer.group_size is not None or (layer.weight_codes.is_cpu and not hasattr(_ops, operator)):
        return False
    largest = math.prod(layer.shape[1:]) * layer.a_quant.levels * 128
    if largest >= 2**30 or (convolution and layer.padding_mode != "zeros"):
        return False
    return layer.calibrated and bool(layer.weight_scale.isfinite().all())


def _packed(layer: Any, weight: Tensor) -> Tensor:
    if not isinstance(layer, nn.Conv2d):
        return _ops.qlinear_prepack(weight, None)  # type: ignore[no-any-return]
    pair = [1, 1]
    return _ops.qconv_prepack(weight, torch.ones(len(weight)), 1.0, 0, pair, [0, 0], pair, layer.groups, None)  # type: ignore[no-any-return]


def _sums_are_exact(layer: Any, found: Prepared, weight: Tensor) -> bool:
    codes = _largest_codes(layer, weight)
    expected = layer.compute(codes.double() - found.zero_point, weight.double(), None)
    found = found._replace(scale=torch.ones_like(found.scale), ones=None)
    return torch.equal(_sums(layer, codes, found, None, torch.float32), expected.float())


def _is_exact(layer: Any, weight: Tensor, halves: bool) -> bool:
    """The same of integers.cpp."""
    codes, zero_point, bias = _largest_codes(layer, weight), layer.a_quant.zero_point, torch.ones(len(weight))
    expected = layer.compute(codes.double() - zero_point, weight.double() + halves / 2, bias.double())
    rounding = 0.0, 1.0, layer.a_quant.levels
    sample = machine.arrange(layer, weight, torch.ones(len(weight)), halves, rounding, zero_point)
    found = sample and machine.output(layer, sample, codes.float(), bias, torch.float32)
    return found is not None and (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def _adds(layer: Any, whole: Tensor, int8: gpu.Int8) -> bool:
    """The same of a GPU, once for each size of a layer."""
    zero_point = layer.a_quant.zero_point
    rows = int8.scale.new_tensor([-zero_point, 1, 0, layer.a_quant.levels])
    sample = int8._replace(rows=rows, scale=torch.ones_like(int8.scale))

    def inputs() -> Tensor:
        codes = _largest_codes(layer, whole).float()
        return codes.sub_(zero_point).repeat(65, 1)  # few and many rows may go different ways

    def expected() -> Tensor:
        return F.linear(inputs().double(), whole.double() + int8.halves / 2)

    def found() -> Tensor:
        both = inputs()
        return torch.cat([gpu.product(part, sample, None, None, torch.float32) for part in (both[:2], both[2:])])

    kind = "int8", *whole.shape, int8.halves, whole.device
    return agrees(kind, found, expected, 1e-6, "a product of whole numbers")


def _largest_codes(layer: Any, weight: Tensor) -> Tensor:
    """Inputs of the largest codes: everywhere, and in places chosen at random, so that what is cut off of positive and of
    negative sums does not cancel out."""
    steps = zip(getattr(layer, "dilation", ()), weight.shape[2:], strict=True)
    image = (max(2 * size + 1, step * (size - 1) + 2) for step, size in steps)
    shape = (2, weight.shape[1] * getattr(layer, "groups", 1), *image)
    codes = torch.full(shape, layer.a_quant.levels, dtype=torch.uint8, device="cpu")
    codes[1] *= torch.rand(shape[1:], generator=torch.Generator().manual_seed(0), device="cpu") < 0.75
    return codes.to(weight.device)


# ------------------------------------------------------------------------------------------------------------ computing


def forward(layer: Any, x: Tensor) -> Tensor:
    """The output for an input that `serves`."""
    if x.requires_grad and torch.is_grad_enabled():
        output: Tensor = _Integers.apply(x, layer)  # type: ignore[no-untyped-call]
        return output
    return _output(layer, x)


class _Integers(torch.autograd.Function):
    """With the gradient of the quantized layer, which computes once more for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.layer = layer
        # What comes next may write to it in place, which autograd allows in no view that was made here.
        return _alone(_output(layer, x))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        refuse_second_derivative(grad)
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            output = ctx.layer.as_quantized(x)
        (of_x,) = torch.autograd.grad(output, x, grad)
        return of_x, None


def _alone(output: Tensor) -> Tensor:
    """The same memory as a tensor of its own, no view of another."""
    return output.new_empty(0).set_(output) if output._is_view() else output  # type: ignore[call-overload, no-any-return]


def _output(layer: Any, x: Tensor) -> Tensor:
    found: Prepared = layer._prepared
    given, x = x, layer.smoothed(x)
    if found.int8 is not None:
        return gpu.product(x, found.int8, layer.a_quant, layer.bias, layer.a_quant.result_dtype(x))
    if found.arranged is not None:
        output = _output_of_machine(layer, x, found.arranged)
        return layer.as_quantized(given) if output is None else output  # type: ignore[no-any-return]
    if found.rows is None:
        return _output_of_tokens(layer, x, found)
    codes, has_nan = run_codes(x, found.rows)
    if not torch.compiler.is_compiling() and has_nan:
        return layer.as_quantized(given)  # type: ignore[no-any-return]
    dtype = layer.a_quant.result_dtype(x)
    bias = None if layer.bias is None else layer.bias.detach().float()
    output = _sums(layer, codes, found, bias, torch.float32 if dtype == torch.float16 else dtype).to(dtype)
    image = isinstance(layer, nn.Conv2d)
    output = output if image else output.view(*x.shape[:-1], -1)
    if torch.compiler.is_compiling():
        output = torch.where(machine.with_nan(x, image), torch.nan, output)
    return output.contiguous() if image and x.is_contiguous() else output


def _output_of_machine(layer: Any, x: Tensor, arranged: machine.Arranged) -> Tensor | None:
    dtype, bias = layer.a_quant.result_dtype(x), layer.bias
    bias = None if bias is None else bias.detach().float()
    wide = x.float() if x.dtype == torch.float16 else x
    result = machine.output(layer, arranged, wide, bias, torch.float32 if dtype == torch.float16 else dtype)
    if result is None:
        return None
    image = x.ndim == 4 and isinstance(layer, nn.Conv2d)
    return (result.contiguous() if image and x.is_contiguous() else result).to(dtype)


def _output_of_tokens(layer: Any, x: Tensor, found: Prepared) -> Tensor:
    codes, scale = layer.a_quant.coded(x)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    output = _sums(layer, codes, found, None, torch.float32).view(*x.shape[:-1], -1).mul_(scale)
    if layer.bias is not None:
        output += layer.bias.detach()
    return output.to(layer.a_quant.result_dtype(x))


def _sums(layer: Any, codes: Tensor, found: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`scale` times the sums, and the bias."""
    product = _convolution if isinstance(layer, nn.Conv2d) else _linear
    if found.ones is None:
        return product(layer, codes, found.zero_point, found.weight, found.scale, bias, dtype)
    output = product(layer, codes, found.zero_point, found.weight, found.scale, bias, torch.float32)
    groups = getattr(layer, "groups", 1)
    inputs = product(layer, codes, found.zero_point, found.ones, found.scale.new_ones(groups), None, torch.float32)
    parts = output.view(len(output), groups, -1, *output.shape[2:])
    parts.addcmul_(inputs.unsqueeze(2), found.scale.view(groups, -1, *(1,) * (output.ndim - 2)), value=0.5)
    return output.to(dtype)


def _linear(
    layer: Any, codes: Tensor, zero_point: int, weight: Any, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows = codes.reshape(-1, codes.shape[-1])
    if torch.compiler.is_compiling():
        in_graph: Tensor = torch.ops.hf_daq.integer_linear(rows, zero_point, weight, scale, bias, dtype)
        return in_graph
    return _product(rows, zero_point, weight, scale, bias, dtype)


def _product(
    codes: Tensor, zero_point: int, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    none = torch.zeros(len(scale), dtype=torch.int32)
    output: Tensor = _ops.qlinear_pointwise(
        codes, 1.0, zero_point, weight, scale, none, bias, 1.0, 0, dtype, "none", [], ""
    )
    return output


# In a graph, as inductor compiles oneDNN's own operator for weights that are constants alone.
_library = torch.library.Library("hf_daq", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "integer_linear(Tensor codes, int zero_point, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.impl("integer_linear", _product, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("hf_daq::integer_linear", lib=_library)
def _(codes: Tensor, zero_point: int, weight: Any, scale: Tensor, bias: Any, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(len(codes), len(scale), dtype=dtype)


def _convolution(
    layer: Any, codes: Tensor, zero_point: int, weight: Any, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    codes, padding = _padded(layer, codes, zero_point)
    sizes = list(layer.stride), padding, list(layer.dilation), layer.groups
    none = torch.zeros(len(scale), dtype=torch.int32)
    codes = codes.contiguous(memory_format=torch.channels_last)
    output: Tensor = _ops.qconv2d_pointwise(
        codes, 1.0, zero_point, weight, scale, none, bias, *sizes, 1.0, 0, dtype, "none", [], ""
    )
    return output


def _padded(layer: Any, codes: Tensor, zero_point: int) -> tuple[Tensor, list[int]]:
    """Codes and the padding that is left to the convolution, which pads with the real zero and on both sides alike."""
    if layer.same_pad:
        return pad_same(codes, layer.kernel_size, layer.stride, layer.dilation, value=zero_point), [0, 0]
    if not isinstance(layer.padding, str):
        return codes, list(layer.padding)
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if (left, top) == (right, bottom):
        return codes, [top, left]
    return F.pad(codes, (left, right, top, bottom), value=zero_point), [0, 0]


@cache
def _say_inexact() -> None:
    logger.warning(
        "this processor or build of torch does not add products of whole numbers exactly (VNNI instructions are missing): "
        "packed layers whose largest sums come out wrong compute in float, slower and right; with a compiler of C++ (g++), and "
        "without HF_DAQ_COMPILE=0, there is another way"
    )
