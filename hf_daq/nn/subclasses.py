"""Subclasses of layers that compute what the layer they derive from computes, such as the output projection of
`nn.MultiheadAttention`, and embeddings that multiply what they look up, as Gemma and BART have them, with a forward
`return super().forward(ids) * self.embed_scale`. Their quantized classes are made where a model has them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from timm.models import register_notrace_module
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .base import DaqLayer
from .layers import LAYER_TYPES
from .packed import PACKED_TYPES, add_packed
from .tied import TIED_TYPES, add_tied

_BASES = tuple(LAYER_TYPES)
_COMPUTING = {"forward", "__call__", "_conv_forward", "_output_padding", "weight", "bias", "__getattr__"}


def know_subclasses(model: nn.Module) -> None:
    """Add the classes of the layers of a model that compute what a known one computes to those that can be quantized."""
    for kind in {type(module) for module in model.modules()}:
        if kind not in LAYER_TYPES and issubclass(kind, _BASES) and not issubclass(kind, DaqLayer | LazyModuleMixin):
            _add(kind)


def _add(kind: Any) -> None:
    ancestors = kind.__mro__
    base = next(one for one in ancestors if one in _BASES)
    own: dict[str, Any] = {}
    if any(_COMPUTING & vars(one).keys() for one in ancestors[: ancestors.index(base)]):
        if (found := _scale_of(kind)) is None:
            return
        own = {"scale_attribute": found[0], "scale_cast": found[1]}
    own |= {"float_class": kind, "__reduce_ex__": _reduced, "__module__": __name__}
    LAYER_TYPES[kind] = type(f"Daq{kind.__name__}", (LAYER_TYPES[base], kind), own)
    register_notrace_module(LAYER_TYPES[kind])
    add_packed(kind)
    if base in TIED_TYPES:
        add_tied(kind)


def _scale_of(kind: Any) -> tuple[str, bool] | None:
    """The attribute with which the forward of an embedding multiplies, and whether it does so in the dtype of the weight; None
    if the class does anything else."""
    if kind.__bases__ != (nn.Embedding,) or kind.forward.__qualname__ != f"{kind.__qualname__}.forward":
        return None
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    statements = [one for one in tree.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    if len(tree.args.args) != 2 or len(statements) != 1:
        return None
    text, before = ast.unparse(statements[0]), f"return super().forward({tree.args.args[1].arg}) * self."
    attribute = text.removeprefix(before).removesuffix(".to(self.weight.dtype)")
    if not text.startswith(before) or not attribute.isidentifier() or attribute == "weight":
        return None
    return attribute, text.endswith(")")


def _reduced(layer: Any, protocol: int) -> tuple[Any, ...]:
    """For copies and pickle, which does not find a class that was made here."""
    return _blank, (layer.float_class, layer.w_quant is None, layer.owner is not None), layer.__getstate__()


def _blank(kind: Any, packed: bool, tied: bool) -> Any:
    if kind not in LAYER_TYPES:
        _add(kind)
    made: Any = TIED_TYPES[kind] if tied else LAYER_TYPES[kind]
    return object.__new__(PACKED_TYPES[made] if packed else made)
