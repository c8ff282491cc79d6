"""Layers that share the weight of an embedding, as output embeddings do: they compute with its quantizer, or with its codes,
and hold none of their own. Files have them once."""

from __future__ import annotations

from typing import Any

from timm.models import register_notrace_module
from torch import Tensor, nn

from ..config import DaqConfig
from .base import DaqLayer
from .layers import LAYER_TYPES
from .packed import PACKED_TYPES, PLAIN
from .quantizers import WeightQuantizer
from .swap import change_class


class TiedLayer(DaqLayer):
    """Comes before the class of a quantized or a packed layer. The input is not quantized.

    owners: the embedding. In a tuple, for it is no module of this one.
    """

    owners: tuple[Any]

    @property
    def owner(self) -> DaqLayer:
        owner: DaqLayer = self.owners[0]
        return owner

    @property
    def w_quant(self) -> WeightQuantizer | None:  # type: ignore[override]
        return self.owner.w_quant

    @property
    def weight_codes(self) -> Tensor:
        codes: Tensor = self.owners[0].weight_codes
        return codes

    @property
    def weight_scale(self) -> Tensor:  # type: ignore[override]
        return self.owner.weight_scale


def _tied_class(kind: type) -> type:
    tied = type(f"Tied{kind.__name__}", (TiedLayer, kind), {"__module__": __name__})
    register_notrace_module(tied)
    globals()[tied.__name__] = tied  # where pickle looks for it
    return tied


TIED_TYPES: dict[type[nn.Module], Any] = {}
"""Float class -> quantized class of layers that may share the weight of an embedding."""


def add_tied(float_class: type[nn.Module]) -> None:
    """Make the tied classes for a float one of `LAYER_TYPES`."""
    quantized_class = LAYER_TYPES[float_class]
    TIED_TYPES[float_class] = tied = _tied_class(quantized_class)
    PACKED_TYPES[tied] = _tied_class(PACKED_TYPES[quantized_class])


for _float_class in (nn.Linear, nn.Embedding):
    add_tied(_float_class)


def tie_layer(layer: Any, owner: DaqLayer, name: str, config: DaqConfig) -> None:
    """Turn a float layer into one that computes with the quantizer of a quantized embedding, in place."""
    change_class(layer, TIED_TYPES[type(layer)])
    layer.owners, layer.daq_name, layer.low_memory = (owner,), name, config.low_memory
    layer.train(layer.training)


def unpack_tied(layer: Any, config: DaqConfig) -> None:
    """Turn a packed layer into a quantized one, in place, after the embedding."""
    owner, name, bias = layer.owner, layer.daq_name, layer.bias
    layer._forget()
    has_place = "bias" in layer._parameters
    for key in ("owners", *(("bias",) if has_place else ()), *PLAIN):
        delattr(layer, key)
    change_class(layer, layer.float_class)
    layer.weight = owner.weight
    if has_place:
        layer.register_parameter("bias", bias)
    tie_layer(layer, owner, name, config)
