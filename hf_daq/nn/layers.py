"""Quantized layers. Each is the float layer's class with `QuantizedLayer` in front: same parameters, same names.

An instance is made by giving a float layer its quantized class (`quantize_layer`), so references to it, hooks on it
and its Parameter objects stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from timm.models import register_notrace_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import DaqConfig
from ..errors import CalibrationError, ModelError
from .base import DaqLayer, layer_input, refuse_open, set_input_quantizer
from .functional import node_of, recomputed
from .kept import Fingerprint, Kept
from .quantizers import ActivationQuantizer, WeightQuantizer, is_shard
from .siblings import once
from .swap import change_class
from .token import TokenQuantizer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def sums_of(weight: Tensor) -> tuple[float, float]:
    """Two, which tell whether a weight is still the same."""
    weight = weight.detach()
    return float(weight.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(weight, dtype=torch.float64))


class QuantizedLayer(DaqLayer):
    """Quantizes input and weight, then does what the float layer does.

    low_memory: the quantized input and weight are not kept for the backward but computed once more in it.

    Without gradients the quantized weight is kept until a parameter changes, whatever wrote it, `train()` or `eval()` is
    called, or a forward learns.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ("weight",)
    """Of what the weight is made of; the first has its shape."""
    weight: Any
    w_quant: WeightQuantizer
    low_memory: bool
    _kept: Kept | None = None
    _fitted: tuple[float, float] | None = None
    _sharded = False

    @property
    def fitted(self) -> bool:
        """Whether the float weight is one that `reconstruct` wrote."""
        return self._fitted is not None and all(
            map(partial(math.isclose, rel_tol=1e-9), self._fitted, sums_of(self.weight))
        )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A float layer: adapters are built with the class of the layer beside them. Copies come without arguments."""
        return cls.float_class(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def config_of(cls, config: DaqConfig, layer: Any) -> DaqConfig:
        """The config of a model as it holds for a float layer of `float_class`."""
        return config

    def weight_keys(self, name: str) -> list[str]:
        """The names of `parameter_names` in state dicts, for a layer of this name."""
        return [f"{name}.{key}" for key in self.parameter_names]

    def drop_parameters(self) -> None:
        """For codes that take their place."""
        for name in list(self._parameters):
            delattr(self, name)

    def float_weight(self) -> Tensor:
        """The weight that is quantized, shape (out, in / groups, ...): what the float layer computes with, `smoothed_weight`."""
        return self.smoothed_weight(self.weight)

    def in_float(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """What the float layer computes; with another weight like `float_weight`."""
        return self.compute(self.smoothed(x), self.float_weight() if weight is None else weight, self.bias)

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `float_weight`: (out, in / groups, ...)."""
        return tuple(self.weight.shape)

    @property
    def first_parameter(self) -> Any:
        """Of `parameter_names`."""
        return self.weight

    def write_weight(self, weight: Tensor) -> None:
        """Write values of `stored` to the parameters."""
        self.weight.copy_(weight)

    def slope(self) -> Tensor | None:
        """How much of a small change of the first parameter is in the weight; None where it is the weight."""
        return None

    def codes(self) -> Tensor:
        return self.w_quant.codes(self.float_weight())

    def quantized_bias(self) -> Tensor | None:
        return self.w_quant.shifted(self.bias, self.weight_dtype)

    @property
    def weight_bits(self) -> int:  # type: ignore[override]
        return self.w_quant.bits

    @property
    def weight_scale(self) -> Tensor:  # type: ignore[override]
        return self.w_quant.output_scale.detach()

    @property
    def weight_dtype(self) -> torch.dtype:  # type: ignore[override]
        dtype: torch.dtype = self.weight.dtype
        return dtype

    @property
    def group_size(self) -> int | None:  # type: ignore[override]
        return self.w_quant.group_size if self.w_quant.groups > 1 else None

    @property
    def has_bias(self) -> bool:  # type: ignore[override]
        return self.bias is not None

    @property
    def weight_grid(self) -> str:  # type: ignore[override]
        return self.w_quant.grid

    def quantized_forward(self, x: Tensor) -> Tensor:
        self._check_calibrated()
        x = x if self.a_quant is None else once(self, x, self.a_quant)
        weight = self.quantized_weight()
        bias = self.quantized_bias()
        if self.low_memory and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with _recomputing(x, weight):
                return self.compute(x, weight, bias)
        return self.compute(x, weight, bias)

    def _check_calibrated(self) -> None:
        if not self.calibrated:
            raise CalibrationError(
                f"layer {self.daq_name!r} is not calibrated; before the first forward write\n"
                "    with hf_daq.calibrate(model):\n        model(batch)  # a few batches of real inputs"
            )

    def quantized_weight(self) -> Tensor:
        """The weight the quantized layer computes with, as `float_weight`."""
        if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:
            sources = self._sources()
            if self._may_keep(sources):
                return self._kept_weight(sources)
            self._forget()
        weight: Tensor = self.w_quant(self.float_weight())
        return weight

    def _sources(self) -> list[Any]:
        """What the quantized weight depends on, the weight first. Pruning, and adapters that parametrize, compute it anew for
        each forward, from what no list has."""
        parameters = [*self._parameters.items(), *self.w_quant._parameters.items(), ("smooth", self.smooth)]
        other = [value for name, value in parameters if value is not None and name not in ("weight", "bias", "shift")]
        return [self.weight, *other]

    def _may_keep(self, sources: list[Any]) -> bool:
        """Whether nothing learns here, and changes of these parameters can be seen."""
        if self._sharded or (torch.is_grad_enabled() and any(source.requires_grad for source in sources)):
            return False
        if self.first_parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        return all(type(source) in (Tensor, nn.Parameter) and not source.is_inference() for source in sources)

    def _kept_weight(self, sources: list[Any]) -> Tensor:
        kept = self._kept
        options = self.w_quant.result_dtype(self.first_parameter), self.w_quant.training
        known = kept is not None and kept.options == options and kept.source.fits(sources)
        if kept is not None and known and kept.weight is not None:
            return kept.weight
        with torch.inference_mode(False), torch.no_grad():
            source = kept.source if kept is not None and known else Fingerprint(sources)
            weight: Tensor = self.w_quant(self.float_weight())
        # Checkpointing runs a layer once without gradients and once with: in training the second time is worth keeping.
        self._kept = Kept(source, options, weight if known or not self.training else None)
        return weight

    def _forget(self) -> None:
        self.__dict__.pop("_kept", None)

    def train(self, mode: bool = True) -> Any:
        self._forget()
        self._sharded = is_shard(self.first_parameter)  # whole weights of all layers would undo the sharding
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]
        _, strict, _, _, errors = args
        bounds = f"{prefix}a_quant.upper"
        own = self.input_owner is None and isinstance(self.a_quant, ActivationQuantizer)
        if strict and own and f"{prefix}w_quant.upper" in state_dict and bounds not in state_dict:
            errors.append(
                f"{bounds} is missing: where this state dict is from, layer {self.daq_name!r} shares the bounds of its input with "
                "another one. Quantize with the config of that model: hf_daq.apply_daq(model, saved.daq_config), or open the "
                "folder with hf_daq.from_pretrained"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_kept", "_shared_result")}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; after it each module is in the mode it was in."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
            if mode:
                module.__dict__.pop("_kept", None)


@contextmanager
def _recomputing(*quantized: Tensor) -> Iterator[None]:
    """What is saved for the backward inside is, where it is one of these tensors, computed again from its own inputs."""
    nodes = {tensor.untyped_storage().data_ptr(): node for tensor in quantized if (node := node_of(tensor)) is not None}

    def pack(saved: Tensor) -> Any:
        node = nodes.get(saved.untyped_storage().data_ptr())
        return saved if node is None else (node, saved.shape, saved.stride(), saved.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        node, *view = packed
        return recomputed(node).as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class DaqLinear(QuantizedLayer, nn.Linear):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class DaqTimmLinear(QuantizedLayer, timm.layers.Linear):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class DaqConv1D(QuantizedLayer, Conv1D):
    """GPT-2's linear layer, whose parameter has the shape (in, out)."""

    def float_weight(self) -> Tensor:
        return self.smoothed_weight(self.weight.t())

    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[::-1])

    def stored(self, weight: Tensor) -> Tensor:
        return weight.t()

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class DaqConv2d(QuantizedLayer, nn.Conv2d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = self._conv_forward(x, weight, bias)
        return output


class DaqConv1d(QuantizedLayer, nn.Conv1d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = self._conv_forward(x, weight, bias)
        return output


class DaqConv3d(QuantizedLayer, nn.Conv3d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = self._conv_forward(x, weight, bias)
        return output


class Transposed(DaqLayer):
    """Transposed convolutions, whose parameter has the shape (in, out / groups, ...): each group by itself is the weight with
    its first two dimensions exchanged."""

    stride: Any
    padding: Any
    output_padding: Any
    dilation: Any
    kernel_size: Any
    groups: int
    in_channels: int
    out_channels: int

    def forward(self, input: Tensor | None = None, output_size: Any = None, **named: Tensor) -> Tensor:
        if not isinstance(self, DaqLayer):  # somebody kept this method of a layer that has another class now
            return type(self).forward(self, input, output_size, **named)
        if output_size is not None:
            raise ModelError(
                f"layer {self.daq_name!r} was called with output_size, and a quantized layer has the size that its "
                f"output_padding says; leave it in full precision: modules_to_not_convert=[{self.daq_name!r}]"
            )
        return DaqLayer.forward(self, input, **named)

    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def stored(self, weight: Tensor) -> Tensor:
        return _exchanged(weight, self.groups)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.kernel_size) - 1]
        output: Tensor = function(
            x, self.stored(weight), bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
        return output


def _exchanged(weight: Tensor, groups: int) -> Tensor:
    parts = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return parts.reshape(-1, *parts.shape[2:])


class _QuantizedTransposed(Transposed, QuantizedLayer):
    def float_weight(self) -> Tensor:
        return _exchanged(self.weight, self.groups)


class DaqConvTranspose1d(_QuantizedTransposed, nn.ConvTranspose1d):
    pass


class DaqConvTranspose2d(_QuantizedTransposed, nn.ConvTranspose2d):
    pass


class DaqConvTranspose3d(_QuantizedTransposed, nn.ConvTranspose3d):
    pass


class _TimmConv(QuantizedLayer):
    stride: Any
    padding: Any
    dilation: Any
    kernel_size: Any
    groups: int
    out_channels: int


class DaqConv2dSame(_TimmConv, timm.layers.Conv2dSame):
    same_pad = True

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = pad_same(x, weight.shape[-2:], self.stride, self.dilation)
        return F.conv2d(x, weight, bias, self.stride, (0, 0), self.dilation, self.groups)


class StandardizedConv(_TimmConv):
    """timm's weight-standardized convolutions: the standardized weight is what gets quantized."""

    standardizes = True
    eps: float
    gain: nn.Parameter
    scale: float

    def float_weight(self) -> Tensor:
        gain = (self.gain * self.scale).view(-1) if hasattr(self, "gain") else None
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=self.eps)
        return weight.reshape_as(self.weight)

    def slope(self) -> Tensor:
        weight: Tensor = self.weight
        return (self.float_weight().flatten(1).std(1) / weight.flatten(1).std(1)).view(-1, 1, 1, 1)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class DaqStdConv2d(StandardizedConv, timm.layers.StdConv2d):
    pass


class DaqStdConv2dSame(StandardizedConv, timm.layers.StdConv2dSame):
    pass


class DaqScaledStdConv2d(StandardizedConv, timm.layers.ScaledStdConv2d):
    pass


class DaqScaledStdConv2dSame(StandardizedConv, timm.layers.ScaledStdConv2dSame):
    pass


class DaqEmbedding(QuantizedLayer, nn.Embedding):
    """Quantizes the rows that it looks up. Every row has bounds of its own.

    scale_attribute: name of what rows are multiplied with, None if they are not; scale_cast: whether in their dtype.
    """

    bias = None
    scale_attribute: ClassVar[str | None] = None
    scale_cast: ClassVar[bool] = False

    @classmethod
    def config_of(cls, config: DaqConfig, layer: Any) -> DaqConfig:
        return config.per_row()

    def quantized_forward(self, x: Tensor) -> Tensor:
        self._check_calibrated()
        return self.scaled(self.w_quant.looked_up(self.weight, x, self.padding_idx))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.scaled(F.embedding(x, weight, self.padding_idx))

    def scaled(self, rows: Tensor) -> Tensor:
        """What the layer gives for the rows that it has looked up."""
        if self.scale_attribute is None:
            return rows
        scale = getattr(self, self.scale_attribute)
        product: Tensor = rows * (scale.to(rows.dtype) if self.scale_cast else scale)
        return product


LAYER_TYPES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: DaqLinear,
    timm.layers.Linear: DaqTimmLinear,
    Conv1D: DaqConv1D,
    nn.Conv1d: DaqConv1d,
    nn.Conv2d: DaqConv2d,
    nn.Conv3d: DaqConv3d,
    nn.ConvTranspose1d: DaqConvTranspose1d,
    nn.ConvTranspose2d: DaqConvTranspose2d,
    nn.ConvTranspose3d: DaqConvTranspose3d,
    timm.layers.Conv2dSame: DaqConv2dSame,
    timm.layers.StdConv2d: DaqStdConv2d,
    timm.layers.StdConv2dSame: DaqStdConv2dSame,
    timm.layers.ScaledStdConv2d: DaqScaledStdConv2d,
    timm.layers.ScaledStdConv2dSame: DaqScaledStdConv2dSame,
    nn.Embedding: DaqEmbedding,
}
for _float_type, _quantized_type in LAYER_TYPES.items():
    _quantized_type.float_class = _float_type
    register_notrace_module(_quantized_type)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by name, in the order of `named_modules`."""
    refuse_open(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def quantize_layer(layer: Any, name: str, config: DaqConfig, weight_bits: int, activation_bits: int | None) -> None:
    """Turn a float layer into its quantized form, in place. Its type must be a key of `LAYER_TYPES`."""
    device, quantized_class = layer.weight.device, LAYER_TYPES[type(layer)]
    config = quantized_class.config_of(config, layer)
    shared: dict[str, Any] = {"rounding": config.rounding, "temperature": config.temperature, "device": device}
    w_quant = WeightQuantizer(
        weight_bits,
        quantized_class.weight_shape(layer),
        granularity=config.weight_granularity,
        group_size=config.group_size,
        grid=config.grid(weight_bits),
        scale_dtype=config.scale_dtype,
        # A class of transformers has no place for the bias of a linear layer that had none, nor have exported files.
        shift=config.bias_correction
        and (getattr(layer, "bias", None) is not None or isinstance(layer, CONVOLUTIONS + TRANSPOSED)),
        normalization=config.weight_normalization,
        gamma=config.weight_gamma,
        sigma=config.weight_sigma,
        **shared,
    )
    a_quant = None
    if activation_bits is not None:
        input_class: Any = TokenQuantizer if config.activation_scale == "token" else ActivationQuantizer
        a_quant = input_class(activation_bits, gamma=config.activation_gamma, sigma=config.activation_sigma, **shared)
    change_class(layer, quantized_class)
    layer.register_module("w_quant", w_quant)
    set_input_quantizer(layer, a_quant)
    layer.daq_name = name
    layer.low_memory = config.low_memory
    layer.train(layer.training)


def restore_layer(layer: QuantizedLayer) -> None:
    """Inverse of `quantize_layer`: the float class, without quantizers."""
    float_class: Any = layer.float_class
    for name in ("w_quant", "a_quant"):
        layer._modules.pop(name, None)
    for name in (
        "daq_name",
        "low_memory",
        "owners",
        "input_owners",
        "input_readers",
        "_kept",
        "_fitted",
        "_shared_result",
        "_sharded",
    ):
        layer.__dict__.pop(name, None)
    change_class(layer, float_class)


def _with_input(forward: Callable[[Tensor], Tensor], *args: Tensor, **named: Tensor) -> Tensor:
    return forward(layer_input(args, named))


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside, modules compute with these functions."""
    before = {module: vars(module).get("forward") for module in forwards}  # Accelerate puts one of its own there
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = partial(_with_input, forward)
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own
