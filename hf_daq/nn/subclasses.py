"""Subclasses of layers that change nothing in what these compute, such as the output projection of `nn.MultiheadAttention`: they
are quantized as the layer they derive from. Their quantized classes are made where a model has them."""

from __future__ import annotations

from typing import Any

from timm.models import register_notrace_module
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .base import DaqLayer
from .layers import LAYER_TYPES
from .packed import PACKED_TYPES, add_packed

_BASES = tuple(kind for kind in LAYER_TYPES if not issubclass(kind, nn.Embedding))
_COMPUTING = {"forward", "__call__", "_conv_forward", "_output_padding", "weight", "bias", "__getattr__"}


def know_subclasses(model: nn.Module) -> None:
    """Add the classes of the layers of a model that compute what a known one computes to those that can be quantized."""
    for kind in {type(module) for module in model.modules()}:
        if (base := _base_of(kind)) is not None:
            _add(kind, base)


def _base_of(kind: type) -> type[nn.Module] | None:
    if kind in LAYER_TYPES or issubclass(kind, (DaqLayer, LazyModuleMixin)) or not issubclass(kind, _BASES):
        return None
    ancestors = kind.__mro__
    base = next(one for one in ancestors if one in _BASES)
    own = ancestors[: ancestors.index(base)]
    return None if any(_COMPUTING & vars(one).keys() for one in own) else base


def _add(kind: Any, base: type[nn.Module]) -> None:
    own = {"float_class": kind, "__reduce_ex__": _reduced, "__module__": __name__}
    LAYER_TYPES[kind] = type(f"Daq{kind.__name__}", (LAYER_TYPES[base], kind), own)
    register_notrace_module(LAYER_TYPES[kind])
    add_packed(kind)


def _reduced(layer: Any, protocol: int) -> tuple[Any, ...]:
    """For copies and pickle, which does not find a class that was made here."""
    return _blank, (layer.float_class, layer.w_quant is None), layer.__getstate__()


def _blank(kind: Any, packed: bool) -> Any:
    if kind not in LAYER_TYPES:
        base = _base_of(kind)
        assert base is not None
        _add(kind, base)
    made: Any = LAYER_TYPES[kind]
    return object.__new__(PACKED_TYPES[made] if packed else made)
