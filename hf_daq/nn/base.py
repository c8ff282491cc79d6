"""What quantized and packed layers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, ModelError
from .leaf import Leaf, traced
from .quantizers import ActivationQuantizer, WeightQuantizer, is_shard

_LARGEST = 1e15  # of a weight: float32 holds the sum of the squares of a row


class DaqLayer(Leaf):
    """A layer that computes with codes of its weight.

    w_quant: None for packed layers, which have no float weight. a_quant: `ActivationQuantizer` or
    `TokenQuantizer`, None for weights only. daq_name: the module's name in the model, for error messages.
    weight_scale: shape (1,), (channels,) or (channels * groups,): the weight is `|weight_scale| * (q - c) / c`.
    weight_grid: "odd", `c = R / 2`, "integer", `c = 2**(bits - 1)`, or "ternary", `c = 1`.
    group_size: columns that share a scale; None without groups.
    weight_dtype: of the float layer's weight. has_bias: whether the float layer has one.
    """

    float_class: ClassVar[type[nn.Module]]
    standardizes: ClassVar[bool] = False
    """Whether the float layer standardizes its weight in every forward: then its codes are no weights to train."""
    same_pad: bool = False
    """Whether a convolution pads as TensorFlow's "same", by what its input needs."""
    bias: Any
    w_quant: WeightQuantizer | None
    daq_name: str
    weight_bits: int
    weight_grid: str
    weight_scale: Tensor
    weight_dtype: torch.dtype
    group_size: int | None
    has_bias: bool
    input_owners: tuple[DaqLayer, ...] = ()
    """The layer whose quantizer this one uses for its input. In a tuple, for it is no module of this one."""
    input_readers = 1
    """How many layers use the quantizer of the input that this one has."""

    def forward(self, input: Tensor | None = None, **named: Tensor) -> Tensor:
        if not isinstance(self, DaqLayer):  # somebody kept this method of a layer that has another class now
            return type(self).forward(self, input, **named)
        x = layer_input((input,), named)
        if isinstance(x, torch.fx.Proxy):
            return traced(self, x)  # type: ignore[no-any-return]
        return self.quantized_forward(x)

    def quantized_forward(self, x: Tensor) -> Tensor:
        """The layer's output for an input that is a tensor."""
        raise NotImplementedError

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer's function of an input, a weight of `weight_shape`, and a bias."""
        raise NotImplementedError

    def stored(self, weight: Tensor) -> Tensor:
        """A weight of `weight_shape` in the layout of the parameter `weight`."""
        return weight

    @property
    def smooth(self) -> Tensor | None:
        """What the channels of the input are divided by, and the columns of the weight multiplied with, before both are rounded:
        shape (columns,). None where they are not."""
        quantizer = self.a_quant
        return None if quantizer is None else quantizer._buffers.get("smooth")

    def smoothed(self, x: Tensor) -> Tensor:
        """An input as it is rounded."""
        return x if self.smooth is None else self.a_quant.smoothed(x)

    def smoothed_weight(self, weight: Tensor) -> Tensor:
        """A weight of `weight_shape` of the float layer as it is quantized."""
        smooth = self.smooth
        return weight if smooth is None else weight * smooth.to(weight.device, weight.dtype)

    def unsmoothed_weight(self, weight: Tensor) -> Tensor:
        """Inverse of `smoothed_weight`, exact."""
        smooth = self.smooth
        return weight if smooth is None else weight / smooth.to(weight.device, weight.dtype)

    def as_parameter(self, weight: Tensor) -> Tensor:
        """A weight like `float_weight` as the parameter `weight` has it."""
        return self.stored(self.unsmoothed_weight(weight))

    def weight_shape(self) -> tuple[int, ...]:
        """(out, in / groups, ...)."""
        raise NotImplementedError

    def codes(self) -> Tensor:
        """Of the weight: uint8, shape `weight_shape`."""
        raise NotImplementedError

    def quantized_bias(self) -> Tensor | None:
        """What the layer adds: the float layer's bias, and a correction."""
        raise NotImplementedError

    @property
    def owner(self) -> DaqLayer | None:
        """The embedding whose weight this layer shares; None where it has its own."""
        return None

    @property
    def input_owner(self) -> DaqLayer | None:
        """The layer whose quantizer this one uses for its input; None where it has its own, or none."""
        return self.input_owners[0] if self.input_owners else None

    @property
    def a_quant(self) -> Any:
        return (self.input_owner or self)._modules.get("a_quant")

    @property
    def input_bits(self) -> int | None:
        """None where the input is not quantized."""
        return None if self.a_quant is None else self.a_quant.bits

    @property
    def entry(self) -> dict[str, Any]:
        """What `DaqConfig.layers` says of this layer."""
        bits = {"weight_bits": self.weight_bits, "activation_bits": self.input_bits}
        if self.input_owner is not None:
            return bits | {"same_input_as": self.input_owner.daq_name}
        return bits if self.smooth is None else bits | {"smooth": True}

    @property
    def span(self) -> Tensor | float:
        """The input that quantizing turns into 1, shape (1,); 1 where the input is not quantized or has a scale for each
        token."""
        return 1.0 if self.a_quant is None else self.a_quant.span

    @property
    def quantizers(self) -> dict[str, WeightQuantizer | ActivationQuantizer]:
        """The quantizers that hold bounds, by the names of their modules."""
        both = {"w_quant": self.w_quant, "a_quant": self.a_quant}
        kinds = WeightQuantizer | ActivationQuantizer
        return {name: quantizer for name, quantizer in both.items() if isinstance(quantizer, kinds)}

    @property
    def calibrated(self) -> bool:
        """True once bounds and scale have values, from `calibrate` or from a state dict."""
        return all(quantizer.calibrated for quantizer in self.quantizers.values())


def check_finite(layers: Mapping[str, Any]) -> None:
    """Refuse float weights that codes cannot stand for."""
    for name, layer in layers.items():
        if layer.owner is not None or layer.w_quant is None or layer.weight.is_meta or is_shard(layer.first_parameter):
            continue
        if problem := weight_problem(layer.float_weight()):
            raise ModelError(f"the weight of layer {name!r} has {problem}, which no code stands for")


def weight_problem(weight: Tensor) -> str | None:
    """What codes cannot stand for in a float weight."""
    largest = torch.stack(weight.detach().aminmax()).abs().max()
    if not largest.isfinite():
        return "NaN or infinite values"
    return f"values up to {float(largest):.0e}, whose squares are infinite in float32" if largest > _LARGEST else None


def set_input_quantizer(layer: DaqLayer, quantizer: nn.Module | None) -> None:
    """Give a layer the quantizer of its input. An entry of None would let a strict `load_state_dict` pass over bounds."""
    if quantizer is None:
        layer._modules.pop("a_quant", None)
    else:
        layer._modules["a_quant"] = quantizer


def layer_input(args: tuple[Any, ...], named: Mapping[str, Tensor]) -> Tensor:
    """The input of a layer, which a caller may give under the name that the float layer has for it."""
    (found,) = (value for value in (*args, *named.values()) if value is not None)
    tensor: Tensor = found
    return tensor


def check_calibrated(layers: Mapping[str, DaqLayer], before: str) -> None:
    for name, layer in layers.items():
        if not layer.calibrated:
            raise CalibrationError(f"layer {name!r} is not calibrated; run hf_daq.calibrate(model) before {before}")


INSIDE = (
    "the model is inside of `with hf_daq.calibrate(model):`, where its layers compute in float: run batches there, and "
    "do all else after it"
)


def refuse_open(model: nn.Module) -> None:
    """Refuse a model inside `calibrate`, whose layers are float ones there."""
    for module in model.modules():
        if isinstance(module._modules.get("w_quant"), WeightQuantizer) and not isinstance(module, DaqLayer):
            raise ModelError(INSIDE)


def refuse_adapted_weights(model: nn.Module, what: str) -> None:
    """Refuse a model whose layers compute with other weights than their own: those with adapters inside their quantizers.

    Args:
        what: that cannot be done, e.g. "exported".
    """
    for name, module in model.named_modules():
        if getattr(module, "adapts_weight", False) and not (module.merged or module.disable_adapters):
            raise ModelError(
                f"layer {name!r} has an adapter inside its quantizer, so the model cannot be {what} as it is; first write "
                "model = model.merge_and_unload(), or model.merge_adapter() before it and model.unmerge_adapter() after it"
            )
