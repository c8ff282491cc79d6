"""Layers for inference that hold codes of a few bits instead of a float weight, and the way there and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..config import DaqConfig, stored_bits
from ..errors import ModelError
from .base import DaqLayer, refuse_open, set_input_quantizer
from .bitpack import packed_size, unpack_rows
from .codes import Coded, encode
from .computed import ComputedWeight
from .gpu import Int4
from .layers import LAYER_TYPES, QuantizedLayer, quantize_layer
from .onednn import Prepared
from .parts import codes_in_parts
from .paths import output, path_of
from .quantizers import WeightQuantizer, read_meaning, write_meaning
from .recompute import without_weight
from .siblings import once
from .swap import change_class

_READ_ONLY = (
    "the weight of a packed layer is computed from its codes, and nothing can be written to it; first write "
    "hf_daq.unpack(model), then merge or change weights"
)
# From what a layer has, by the ways it computes: neither copied nor saved.
_MADE = ("_prepared", "_placed", "_int4", "_step")


class _PackedWeight(ComputedWeight):
    problem = _READ_ONLY


class PackedLayer(DaqLayer):
    """Quantizes its input, then does what the float layer does with the weight that its codes mean.

    weight_codes: uint8, shape (bytes,): the codes q of the weight, in C order, as `bitpack` lays them out.
    weight_scale: float32.
    bias: of the quantized layer.
    weight: the weight as the float layer has it, computed when it is read.
    quantizing: options of the weight quantizer that the layer had. frozen: names of its parameters that did not learn.
    fast: whether the layer may round more than the quantized one, where that is faster. It is not saved.

    The weight exists in float only while the layer computes.
    """

    w_quant = None
    weight_codes: Tensor
    shape: tuple[int, ...]
    quantizing: dict[str, Any]
    fast = False
    _prepared: Prepared | None = None
    _int4: Int4 | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A float layer: adapters are built with the class of the layer beside them. Copies come without arguments."""
        return cls.float_class(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def path(self, x: Tensor) -> str:
        """How the layer computes with this input: a name in `paths.PATHS`."""
        return path_of(self, x)

    def quantized_forward(self, x: Tensor) -> Tensor:
        return output(self, x)

    def as_quantized(self, x: Tensor) -> Tensor:
        """What the quantized layer computes, bit for bit."""
        x = x if self.a_quant is None else once(self, x, self.a_quant)

        def compute(x: Tensor) -> Tensor:
            return self.compute(x, self.quantized_weight(x.dtype), self.bias)

        traced = torch._C._get_tracing_state() is not None
        return without_weight(compute, x) if x.requires_grad and not traced else compute(x)

    def weight_shape(self) -> tuple[int, ...]:
        return self.shape

    def coded(self) -> Coded:
        """The weight in codes, as it is in memory."""
        grid, group_size = self.weight_grid, self.group_size
        return Coded(self.weight_codes, self.weight_scale, self.weight_bits, grid, group_size, self.shape)

    def codes(self) -> Tensor:
        return self.coded().codes()

    def quantized_bias(self) -> Tensor | None:
        bias: Tensor | None = self.bias
        return bias

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the layer computes with, as the quantized layer it was; in `weight_dtype` if no other is given."""
        weight = self.coded().weight(dtype or self.weight_dtype)
        # In the layout of the parameter: GPT-2's differs, and with it the last bits of products of few rows.
        return self.stored(self.stored(weight).contiguous())

    def weight_quantizer(self) -> WeightQuantizer:
        """One that gives `weight` the codes of this layer, and weights near it those that training gives them. What it costs
        in memory are three numbers for each scale."""
        bits, grid, size = self.weight_bits, self.weight_grid, self.group_size
        device = self.weight_codes.device
        quantizer = WeightQuantizer(bits, self.shape, group_size=size, grid=grid, device=device, **self.quantizing)
        quantizer.train(self.training)
        parts = [self.float_weight()] if self.coded().granularity() == "tensor" else self._parts()
        return _on_codes(quantizer, parts, self.weight_scale, self.span)

    @torch.no_grad()
    def write_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Others in their place: uint8 of `weight_shape`, and scales."""
        self.weight_codes = encode(codes, self.weight_bits, self.weight_grid)
        self.weight_scale = scale.detach().float().clone()
        self._forget()

    def float_weight(self) -> Tensor:
        """`weight`, of `weight_shape`, as it is quantized."""
        return self._of_float(self.quantized_weight(self._exact))

    @property
    def _exact(self) -> torch.dtype:
        """Of weights that are divided: rounded twice to few bits, some of 8 bits would leave their cells."""
        narrow = self.a_quant is not None and self.weight_dtype.itemsize < 4
        return torch.float32 if narrow else self.weight_dtype

    def _of_float(self, weight: Tensor) -> Tensor:
        """Rows of the quantized weight in the units of the float layer; written over."""
        # The scale of a layer turns quantized inputs, which span one unit, into outputs.
        weight = weight if self.a_quant is None else weight.div_(self.a_quant.span.to(weight.dtype))
        return weight.to(self.weight_dtype)

    def _parts(self) -> Iterator[Tensor]:
        """`float_weight`, some rows after the other: adapters that are made between would lie in the place of whole ones."""
        return map(self._of_float, self.coded().parts(self._exact))

    @property
    def weight(self) -> Tensor:
        stored = self.as_parameter(self.float_weight())
        if torch.compiler.is_compiling():
            return stored
        computed: Any = stored.as_subclass(_PackedWeight)
        computed._is_hf_initialized = True  # transformers initializes what is not
        return computed  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ModelError(_READ_ONLY)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _meaning(self) -> dict[str, Any]:
        """What the codes are for."""
        return {"bits": self.weight_bits, "grid": self.weight_grid}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        write_meaning(destination, prefix, self._meaning())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        given = read_meaning(local_metadata, self._meaning())
        if strict and given != self._meaning():
            lists[-1].append(
                f"{prefix[:-1]} is of a packed model with {given}, and here it has {self._meaning()}. Pack a model that was quantized "
                "with the config of that model: hf_daq.apply_daq(model, saved.daq_config)"
            )

    def _forget(self) -> None:
        for name in _MADE:
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in (*_MADE, "_shared_result")}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.weight_bits}".removeprefix(", ")


class PackedTable(PackedLayer):
    """Reads the codes of the rows that it looks up."""

    bias = None
    scaled: Callable[[Tensor], Tensor]  # of the quantized class

    def quantized_forward(self, x: Tensor) -> Tensor:
        rows = x.flatten()
        scale = F.embedding(rows, self.weight_scale.view(self.shape[0], -1))  # refuses indices that are out of range
        if x.numel() == 0:
            return scale.new_empty(*x.shape, self.shape[1], dtype=self.weight_dtype)
        codes = unpack_rows(
            self.weight_codes, stored_bits(self.weight_bits, self.weight_grid), self.shape[1], rows.long()
        )
        weight = self.coded()._replace(scale=scale.flatten()).weight_of(codes, self.weight_dtype)
        return self.scaled(weight.view(*x.shape, -1))

    def path(self, x: Tensor) -> str:
        return "codes"

    def as_quantized(self, x: Tensor) -> Tensor:
        output: Tensor = self.compute(x, self.quantized_weight(), None)
        return output


def _packed_class(quantized_class: Any) -> type[PackedLayer]:
    float_class = quantized_class.float_class
    base = PackedTable if issubclass(float_class, nn.Embedding) else PackedLayer
    names = ["float_class", "forward", "compute", "stored", "standardizes", "same_pad"]
    if "__reduce_ex__" in vars(quantized_class):
        names.append("__reduce_ex__")
    if base is PackedTable:
        names += ["scaled", "scale_attribute", "scale_cast", "__reduce_ex__"]
    taken = {name: getattr(quantized_class, name) for name in names}
    name = quantized_class.__name__.replace("Daq", "Packed")  # timm's Linear and torch's have one name
    return type(name, (base, float_class), {**taken, "__module__": __name__})


PLAIN = ("weight_bits", "weight_grid", "shape", "group_size", "has_bias", "weight_dtype", "quantizing", "frozen")
_OPTIONS = ("granularity", "scale_dtype", "normalization", "rounding", "gamma", "sigma", "temperature")
PACKED_TYPES: dict[type[QuantizedLayer], type[PackedLayer]] = {}


def add_packed(float_class: type[nn.Module]) -> None:
    """Make the packed class for a float one of `LAYER_TYPES`."""
    quantized_class = LAYER_TYPES[float_class]
    packed = PACKED_TYPES[quantized_class] = _packed_class(quantized_class)
    register_notrace_module(packed)
    globals()[packed.__name__] = packed


for _float_class in LAYER_TYPES:
    add_packed(_float_class)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by name, in the order of `named_modules`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def daq_layers(model: nn.Module) -> dict[str, DaqLayer]:
    """The quantized and the packed layers of a model by name, in the order of `named_modules`."""
    refuse_open(model)
    return {name: part for name, part in model.named_modules() if isinstance(part, DaqLayer)}


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules with the very tensors of the model."""
    tensors = list(model.state_dict(keep_vars=True).values())
    tensors += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value for value in tensors})


@torch.no_grad()
def pack_layer(layer: Any, values: bool = True) -> None:
    """Turn a quantized layer into its packed form, in place. Without `values` there are none yet. A layer that is tied to
    another comes before it."""
    quantizer, dtype, device = layer.w_quant, layer.weight.dtype, layer.weight.device
    own = layer.owner is None
    bits, shape, group_size, has_bias = quantizer.bits, layer.weight_shape(), layer.group_size, layer.has_bias
    frozen = {name for name, parameter in layer.named_parameters() if not parameter.requires_grad}
    if not own:
        codes = scale = None
    elif values:
        codes = encode(codes_in_parts(quantizer, layer.float_weight()), bits, quantizer.grid)
        scale = layer.weight_scale.float().clone()
    else:
        size = packed_size(math.prod(shape), stored_bits(bits, quantizer.grid))
        codes = torch.zeros(size, dtype=torch.uint8, device=device)
        scale = torch.full(quantizer.scale.shape, torch.nan, dtype=torch.float32, device=device)
    bias, holds_bias = layer.quantized_bias(), "bias" in layer._parameters or hasattr(layer, "attentions")
    if own:
        bias = (
            None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        )  # else it is the one that it was
    layer.drop_parameters()
    layer._modules.pop("w_quant", None)
    for name in ("low_memory", "_kept", "_fitted", "_shared_result", "_sharded"):
        layer.__dict__.pop(name, None)
    change_class(layer, PACKED_TYPES[type(layer)])
    if holds_bias:
        layer._parameters["bias"] = bias
    if own:
        layer.register_buffer("weight_codes", codes)
        layer.register_buffer("weight_scale", scale)
    layer.weight_bits, layer.weight_grid, layer.shape, layer.weight_dtype = bits, quantizer.grid, shape, dtype
    layer.group_size, layer.has_bias, layer.frozen = group_size, has_bias, frozen
    layer.quantizing = {name: getattr(quantizer, name) for name in _OPTIONS}
    if layer.a_quant is not None and layer.input_owner is None:
        layer.a_quant = copy.deepcopy(layer.a_quant).requires_grad_(False)  # the model may be a shared copy


@torch.no_grad()
def unpack_layer(layer: Any, config: DaqConfig) -> None:
    """Turn a packed layer into a quantized one, in place, whose float weight lies on the codes."""
    weight, scale, bias = layer.weight.as_subclass(Tensor), layer.weight_scale, layer.bias
    bits, name, has_bias, span = layer.weight_bits, layer.daq_name, layer.has_bias, layer.span
    frozen = layer.frozen
    layer._forget()
    layer.__dict__.pop("fast", None)
    own = layer._modules.pop("a_quant", None)
    holds_bias = "bias" in layer._parameters
    for key in ("weight_codes", "weight_scale", *(("bias",) if holds_bias else ()), *PLAIN):
        delattr(layer, key)
    change_class(layer, layer.float_class)
    layer.weight = nn.Parameter(weight)
    if holds_bias:
        layer.register_parameter("bias", nn.Parameter(bias) if has_bias else None)
    quantize_layer(layer, name, config, bits, None)
    set_input_quantizer(layer, own)
    if layer.w_quant.shift is not None:
        layer.w_quant.shift.copy_(torch.zeros_like(layer.w_quant.shift) if has_bias else bias)
    _on_codes(layer.w_quant, [layer.float_weight()], scale, span)
    if own is not None:
        own.requires_grad_(True)
        own.finish()
    for name in frozen & dict(layer.named_parameters()).keys():
        layer.get_parameter(name).requires_grad_(False)


@torch.no_grad()
def _on_codes(
    quantizer: WeightQuantizer, parts: Iterable[Tensor], scale: Tensor, span: Tensor | float
) -> WeightQuantizer:
    """The quantizer, with bounds that give this weight, in parts of some rows, the codes that it was computed from."""
    largest = scale.abs().clamp_min(1e-12)
    quantizer.set_bounds(parts, largest / span.to(scale.dtype) if isinstance(span, Tensor) else largest)
    quantizer.scale.copy_(scale)
    quantizer.finish(loaded=True)  # training may have turned the sign of a scale
    return quantizer
