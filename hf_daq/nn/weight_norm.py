"""Layers with weight normalization, `w = g v / |v|` (https://arxiv.org/abs/1602.07868), as torch's `weight_norm` gives it to
them: with a parametrization, or in its older form with a hook.

The quantizer sees `w`. Training moves `g` and `v`, which stay the Parameters that they were, under their names. Packed layers
have codes of `w` in their place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import timm.layers
import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers.pytorch_utils import Conv1D

from .base import DaqLayer
from .computed import ComputedWeight
from .layers import CONVOLUTIONS, LAYER_TYPES, TRANSPOSED, QuantizedLayer
from .packed import add_packed
from .swap import change_class

_KINDS = (nn.Linear, timm.layers.Linear, Conv1D, *CONVOLUTIONS, *TRANSPOSED, timm.layers.Conv2dSame)


class _NormalizedWeight(ComputedWeight):
    problem = (
        "the weight of a layer with weight normalization is computed in every forward, and nothing can be written to it; take "
        "the normalization away before apply_daq, with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    )


class Normed(nn.Module):
    """Comes before the class of a float layer, and computes its weight in place of torch's parametrization or hook.

    norms: that one. In a tuple, for it is no module of this one.
    """

    plain: ClassVar[type[nn.Module]]
    norms: tuple[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain layer: adapters are built with the class of the layer beside them. Copies come without arguments."""
        return cls.plain(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @property
    def parts(self) -> list[Any]:
        """Magnitude, and direction, which has the shape of the weight."""
        if isinstance(self.norms[0], WeightNorm):
            return [self.weight_g, self.weight_v]
        parametrized: Any = self.parametrizations
        return [parametrized.weight.original0, parametrized.weight.original1]

    @property
    def weight(self) -> Any:
        magnitude, direction = self.parts
        weight: Any = torch._weight_norm(direction, magnitude, self.norms[0].dim)
        if not torch.compiler.is_compiling():
            weight = weight.as_subclass(_NormalizedWeight)
            weight._is_hf_initialized = True  # transformers initializes what is not
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            _normalize(self, value)
        else:
            super().__setattr__(name, value)


@torch.no_grad()
def _normalize(layer: Any, weight: Tensor) -> None:
    """Give a layer without parameters of its weight those that this one has."""
    (norm,), kind = layer.norms, type(layer)
    magnitude, direction = map(nn.Parameter, _parted(weight, norm.dim))
    if isinstance(norm, WeightNorm):
        layer.register_parameter("weight_g", magnitude)
        layer.register_parameter("weight_v", direction)
        return
    layer.__class__ = layer.plain
    layer.register_parameter("weight", direction)
    parametrize.register_parametrization(layer, "weight", norm)
    layer.parametrizations.weight.original0 = magnitude
    layer.__class__ = kind


def _parted(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Magnitude, and a direction also where the weight is 0."""
    magnitude = torch.norm_except_dim(weight, 2, dim)
    return magnitude, torch.where(magnitude == 0, torch.ones_like(weight), weight)


class QuantizedNormed(QuantizedLayer):
    norms: tuple[Any]
    parts: list[Any]

    @property
    def parameter_names(self) -> tuple[str, ...]:  # type: ignore[override]
        if isinstance(self.norms[0], WeightNorm):
            return "weight_v", "weight_g"
        return "parametrizations.weight.original1", "parametrizations.weight.original0"

    @property
    def first_parameter(self) -> Any:
        return self.parts[1]

    @property
    def weight_dtype(self) -> torch.dtype:  # type: ignore[override]
        dtype: torch.dtype = self.parts[1].dtype
        return dtype

    def float_weight(self) -> Tensor:
        return super().float_weight().as_subclass(Tensor)

    def drop_parameters(self) -> None:
        super().drop_parameters()
        self._modules.pop("parametrizations", None)

    def write_weight(self, weight: Tensor) -> None:
        for part, value in zip(self.parts, _parted(weight, self.norms[0].dim), strict=True):
            part.copy_(value)

    def slope(self) -> Tensor:
        magnitude, direction = self.parts
        slope: Tensor = magnitude / torch.norm_except_dim(direction, 2, self.norms[0].dim)
        return slope

    def _sources(self) -> list[Any]:
        own = [value for name, value in self.w_quant._parameters.items() if value is not None and name != "shift"]
        return [*reversed(self.parts), *own, *(() if self.smooth is None else (self.smooth,))]


_NORMED: dict[type[nn.Module], type[Normed]] = {}


def _add(kind: Any) -> None:
    quantized = LAYER_TYPES[kind]
    name = quantized.__name__.removeprefix("Daq")  # timm's Linear and torch's have one name
    made: Any = type(f"WeightNorm{name}", (Normed, kind), {"plain": kind, "__module__": __name__})
    own = {"float_class": made, "__module__": __name__}
    daq: Any = type(f"DaqWeightNorm{name}", (QuantizedNormed, quantized, made), own)
    _NORMED[kind], LAYER_TYPES[made] = made, daq
    globals().update({made.__name__: made, daq.__name__: daq})  # where pickle looks for them
    register_notrace_module(daq)
    add_packed(made)


for _kind in _KINDS:
    _add(_kind)


def _norm_of(module: nn.Module) -> Any:
    """What computes the weight of a module, if it is normalization alone; None for all other modules."""
    if not parametrize.is_parametrized(module):
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
        return hooks[0] if len(hooks) == 1 and {"weight_g", "weight_v"} <= module._parameters.keys() else None
    parametrized: Any = module.parametrizations
    if list(parametrized) != ["weight"] or [type(one) for one in parametrized.weight] != [_WeightNorm]:
        return None
    return parametrized.weight[0]


def normed_type(module: nn.Module) -> type[Normed] | None:
    """The class that a float layer with weight normalization gets, which has a quantized one; None for all others."""
    if isinstance(module, Normed):
        return None
    found = _NORMED.get(parametrize.type_before_parametrizations(module))
    return None if found is None or _norm_of(module) is None else found


def as_normed(module: nn.Module) -> nn.Module:
    """A layer with weight normalization as `hold_norms` makes it, with its very parameters; other modules as they are."""
    kind = normed_type(module)
    if kind is None:
        return module
    found: Any = object.__new__(kind)
    vars(found).update(vars(module))
    vars(found)["norms"] = (_norm_of(module),)
    return found  # type: ignore[no-any-return]


def hold_norms(modules: Iterable[nn.Module]) -> None:
    """Take the weight of those with weight normalization from torch's parametrization or hook, in place."""
    for module in modules:
        kind = normed_type(module)
        if kind is not None:
            norm = _norm_of(module)
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is norm]:
                del hooks[key]
            vars(module).pop("weight", None)
            module.norms = (norm,)  # type: ignore[assignment]
            change_class(module, kind)


def give_norms_back(model: nn.Module) -> None:
    """Inverse of `hold_norms`, for all float layers of a model."""
    for module in model.modules():
        if isinstance(module, Normed) and not isinstance(module, DaqLayer):
            _give_back(module)


def _give_back(layer: Any) -> None:
    (norm,), (_, direction), plain = layer.norms, layer.parts, layer.plain
    kept = layer._modules.pop("parametrizations", None)
    del layer.norms
    change_class(layer, plain)
    if kept is None:
        layer.weight = norm.compute_weight(layer)
        layer.register_forward_pre_hook(norm)
    else:
        layer.weight = nn.Parameter(direction.detach(), direction.requires_grad)
        parametrize.register_parametrization(layer, "weight", norm)
        layer._modules["parametrizations"] = kept
