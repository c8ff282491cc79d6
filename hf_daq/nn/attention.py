"""`nn.MultiheadAttention`, whose projections of queries, keys and values are quantized as three linear layers.

They compute with rows of the attention's own `in_proj_weight` (or with its `q_proj_weight`, ...), which stays the Parameter that
it was, under its name. Everything else sees them as layers, `attention.q_proj` and so on. None of torch's fast paths is
taken, because these read the float weights past the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .layers import LAYER_TYPES, QuantizedLayer
from .packed import PackedLayer, add_packed
from .swap import change_class

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def weight_names(attention: nn.MultiheadAttention) -> list[str]:
    """One parameter for all projections, or one for each."""
    return ["in_proj_weight"] if vars(attention)["_qkv_same_embed_dim"] else [f"{name}_weight" for name in PROJECTIONS]


class Projection(nn.Linear):
    """What projects queries, keys or values. attentions: the attention; in a tuple, for it is no module of this one."""

    def __init__(self, attention: nn.MultiheadAttention, place: int) -> None:
        nn.Module.__init__(self)
        self.attentions, self.place = (attention,), place
        self.in_features = (attention.embed_dim, attention.kdim, attention.vdim)[place]
        self.out_features = attention.embed_dim
        self.train(attention.training)

    @property
    def source(self) -> tuple[str, slice]:
        """Name of the attention's parameter, and the rows of it that this layer computes with."""
        names = weight_names(self.attentions[0])
        return (names[0], self.rows) if len(names) == 1 else (names[self.place], slice(None))

    @property
    def rows(self) -> slice:
        return slice(self.place * self.out_features, (self.place + 1) * self.out_features)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        name, rows = self.source
        return _part(self.attentions[0]._parameters[name], rows)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        if "bias" in self._parameters:  # of a packed layer
            return self._parameters["bias"]
        bias = self.attentions[0]._parameters["in_proj_bias"]
        return None if bias is None else _part(bias, self.rows)

    def float_values(self) -> list[Tensor]:
        """Weight and bias."""
        return [value for value in (self.weight, self.bias) if value is not None]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Write the values where the attention has them."""
        if name in self._parameters:
            self._parameters[name] = param
        elif param is not None:
            with torch.no_grad():
                getattr(self, name).copy_(param)


def _part(whole: Any, rows: slice) -> Any:
    part = whole[rows]
    if not torch.compiler.is_compiling() and getattr(whole, "_is_hf_initialized", False):
        part._is_hf_initialized = True  # transformers initializes what is not
    return part


class DaqProjection(QuantizedLayer, Projection):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _sources(self) -> list[Any]:
        return [self.attentions[0]._parameters[self.source[0]], *super()._sources()[1:]]


DaqProjection.float_class = Projection
LAYER_TYPES[Projection] = DaqProjection
register_notrace_module(DaqProjection)
add_packed(Projection)


class DaqMultiheadAttention(nn.MultiheadAttention):
    """Computes with the layers `q_proj`, `k_proj`, `v_proj` and `out_proj`."""

    q_proj: Any
    k_proj: Any
    v_proj: Any

    @property  # what asks for it wants to know whether a fast path may read the weights
    def _qkv_same_embed_dim(self) -> bool:
        return False

    def _reset_parameters(self) -> None:
        for name in weight_names(self):
            nn.init.xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            nn.init.constant_(self.in_proj_bias, 0.0)
            nn.init.constant_(self.out_proj.bias, 0.0)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(
            self, DaqMultiheadAttention
        ):  # somebody kept this method of a module that has another class now
            masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return type(self).forward(self, query, key, value, *masks)  # type: ignore[unreachable]
        batched = F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        extra = (self.bias_k is not None) + self.add_zero_attn
        causal = is_causal and key_padding_mask is None and not need_weights  # as torch, extra keys are hidden too then
        mask = None if causal else _mask(key_padding_mask, attn_mask, q, self.num_heads, extra)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, one.expand(x.shape[0], -1, -1)], 1) for x, one in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (x.reshape(x.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(2, 3)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(3), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights


def _mask(padding: Tensor | None, mask: Tensor | None, q: Tensor, heads: int, extra: int) -> Tensor | None:
    """What is added to the scores, that broadcasts to (batch, heads, queries, keys), or None; 0 for `extra` keys behind."""
    other = F._none_or_dtype(mask)
    padding = F._canonical_mask(padding, "key_padding_mask", other, "attn_mask", q.dtype)
    mask = F._canonical_mask(mask, "attn_mask", None, "", q.dtype, False)
    if mask is not None and mask.ndim == 3:
        mask = mask.view(-1, heads, *mask.shape[1:])
    if padding is not None:
        padding = padding.reshape(q.shape[0], 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask if mask is None or not extra else F.pad(mask, (0, extra))


class PackedMultiheadAttention(DaqMultiheadAttention):
    """Without weights of its own; those that it had are computed from the codes when they are read."""

    def _reset_parameters(self) -> None:
        pass

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        if len(weight_names(self)) > 1:
            return None
        return _together([getattr(self, name).weight for name in PROJECTIONS])

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        bias = [getattr(self, name).bias for name in PROJECTIONS]
        return None if bias[0] is None else _together(bias)


def _together(parts: list[Tensor]) -> Tensor:
    whole: Any = torch.cat(parts)
    whole._is_hf_initialized = True  # transformers initializes what is not
    return whole  # type: ignore[no-any-return]


for _class in (DaqMultiheadAttention, PackedMultiheadAttention):
    register_notrace_module(_class)


def projections(module: nn.Module) -> dict[str, Projection]:
    """The projections of an attention that can be quantized, by the names that they get; none for other modules."""
    if type(module) is not nn.MultiheadAttention:
        return {}
    if any(module._parameters.get(name) is None for name in weight_names(module)):
        return {}
    return {name: Projection(module, place) for place, name in enumerate(PROJECTIONS)}


def parameters_of_attention(layer: Any) -> list[nn.Parameter]:
    """Of which a projection computes with parts."""
    if not isinstance(layer, DaqProjection):
        return []
    held = layer.attentions[0]._parameters
    return [value for name in (layer.source[0], "in_proj_bias") if (value := held[name]) is not None]


def split(modules: Iterable[nn.Module]) -> None:
    """Give the attentions among these their projections as layers, in place."""
    for module in modules:
        if found := projections(module):
            output = module._modules.pop("out_proj")
            module._modules.update(found)
            module._modules["out_proj"] = output  # in the order in which they run
            change_class(module, DaqMultiheadAttention)


def join(model: nn.Module) -> None:
    """Inverse of `split`, for all attentions of a model, when their layers are float ones."""
    for module in _attentions(model):
        for name in PROJECTIONS:
            del module._modules[name]
        change_class(module, nn.MultiheadAttention)


def release(model: nn.Module) -> None:
    """Take the float weights away from attentions whose projections are packed."""
    for module in _attentions(model):
        if isinstance(module.q_proj, PackedLayer) and not isinstance(module, PackedMultiheadAttention):
            for name in [*weight_names(module), "in_proj_bias"]:
                del module._parameters[name]
            change_class(module, PackedMultiheadAttention)


@torch.no_grad()
def allocate(model: nn.Module) -> None:
    """Inverse of `release`: places for the float weights, before the projections are unpacked."""
    for module in _attentions(model):
        if isinstance(module, PackedMultiheadAttention):
            layers = [getattr(module, name) for name in PROJECTIONS]
            parts: dict[str, list[Tensor]] = {}
            for layer in layers:
                parts.setdefault(layer.source[0], []).append(layer.weight.as_subclass(Tensor))
            if layers[0].has_bias:
                parts["in_proj_bias"] = [layer.bias for layer in layers]
            change_class(module, DaqMultiheadAttention)
            module.register_parameter("in_proj_bias", None)
            for name, values in parts.items():
                module.register_parameter(name, nn.Parameter(torch.cat(values)))


def _attentions(model: nn.Module) -> Iterable[Any]:
    return [module for module in model.modules() if isinstance(module, DaqMultiheadAttention)]


# ------------------------------------------------------------------------------------------------- fast paths of encoders

_SWITCHES: dict[Any, str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
"""The attribute that, set to 0, lets a module of torch compute with its layers and not with their weights."""


def has_switch(module: nn.Module) -> bool:
    return any(type(module).forward is kind.forward for kind in _SWITCHES)


def switch_fast_paths(model: nn.Module, on: bool, quantized: type[nn.Module] = nn.Module) -> None:
    """Turn the fast paths of encoders off that hold layers of this class, or on where they were before."""
    for module in model.modules():
        for kind, name in _SWITCHES.items():
            if not isinstance(module, kind):
                continue
            before = f"daq_{name}"
            if on and before in vars(module):
                setattr(module, name, vars(module).pop(before))
            elif (
                not on and before not in vars(module) and any(isinstance(part, quantized) for part in module.modules())
            ):
                setattr(module, before, getattr(module, name))
                setattr(module, name, 0)
