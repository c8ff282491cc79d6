"""Embeddings that multiply what they look up, as Gemma and BART have them: subclasses of `nn.Embedding` whose forward is
`return super().forward(ids) * self.embed_scale`. Their quantized classes are made where a model has them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from timm.models import register_notrace_module
from torch import nn

from .layers import LAYER_TYPES, DaqEmbedding
from .packed import PACKED_TYPES, add_packed
from .tied import TIED_TYPES, add_tied


def know_embeddings(model: nn.Module) -> None:
    """Add the classes of the embeddings of a model to those that can be quantized."""
    for kind in {type(module) for module in model.modules()}:
        if issubclass(kind, nn.Embedding) and kind not in LAYER_TYPES:
            if kind.forward is nn.Embedding.forward:
                _add(kind, None, False)
            elif (found := _scale_of(kind)) is not None:
                _add(kind, *found)


def _add(kind: Any, attribute: str | None, cast: bool) -> None:
    own = {"scale_attribute": attribute, "scale_cast": cast, "float_class": kind, "__reduce_ex__": _reduced}
    LAYER_TYPES[kind] = type(f"Daq{kind.__name__}", (DaqEmbedding, kind), {**own, "__module__": __name__})
    register_notrace_module(LAYER_TYPES[kind])
    add_packed(kind)
    add_tied(kind)


def _scale_of(kind: Any) -> tuple[str, bool] | None:
    """The attribute with which a forward multiplies, and whether it does so in the dtype of the weight; None if the class
    does anything else."""
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if len(tree.args.args) != 2 or kind.forward.__qualname__ != f"{kind.__qualname__}.forward":
        return None
    statements = [one for one in tree.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    name, text = tree.args.args[1].arg, ast.unparse(statements[0]) if len(statements) == 1 else ""
    before = f"return super().forward({name}) * self."
    attribute = text.removeprefix(before).removesuffix(".to(self.weight.dtype)")
    if (
        kind.__bases__ != (nn.Embedding,)
        or not text.startswith(before)
        or not attribute.isidentifier()
        or attribute == "weight"
    ):
        return None
    return attribute, text.endswith(")")


def _reduced(layer: Any, protocol: int) -> tuple[Any, ...]:
    """For copies and pickle, which does not find a class that was made here."""
    return _blank, (layer.float_class, layer.w_quant is None, layer.owner is not None), layer.__getstate__()


def _blank(kind: Any, packed: bool, tied: bool) -> Any:
    if kind not in LAYER_TYPES:
        found = _scale_of(kind)
        _add(kind, *(found or (None, False)))
    made: Any = TIED_TYPES[kind] if tied else LAYER_TYPES[kind]
    made = PACKED_TYPES[made] if packed else made
    return object.__new__(made)
