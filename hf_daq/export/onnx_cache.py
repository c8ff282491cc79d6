"""Decoders with their keys and values as inputs and outputs of the file, so that it generates one token after the other."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..model.batch import Inputs

_FEWEST = 4  # tokens: two in the cache and two new ones, as torch.export takes 0 and 1 for sizes that never change


class WithCache(nn.Module):
    """A decoder that takes tokens, and the keys and values of those before them; it returns its logits and all keys and
    values."""

    def __init__(self, decoder: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.decoder, self.names = decoder, names
        self.config: Any = decoder.config

    def forward(self, tokens: list[Tensor], past: list[Tensor]) -> dict[str, Tensor]:
        logits, present = _run(self.decoder, dict(zip(self.names, tokens, strict=True)), past)
        return {"logits": logits} | {
            name.replace("past_key_values", "present"): value for name, value in present.items()
        }


class CacheInputs(Inputs):
    """The inputs of a `WithCache`, as the file names them."""

    def __init__(self, tokens: dict[str, Tensor], past: dict[str, Tensor]) -> None:
        super().__init__(tokens | past)
        self.count = len(tokens)

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (tensors[: self.count], tensors[self.count :]), {}

    def shapes(self, sequence: bool, size: bool) -> Any:
        rows, columns, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past_sequence"))
        tokens = [{0: rows, 1: torch.export.Dim.AUTO if name == "attention_mask" else columns} for name in self.names]
        return tokens[: self.count], [{0: rows, 2: past} for _ in range(len(self.names) - self.count)]

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def tokens(self) -> bool:
        return False  # there is one way to trace


def _run(decoder: Any, tokens: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the keys and values of all layers by their names."""
    from transformers import DynamicCache

    cache = DynamicCache()  # whole layers: the masks of sliding windows do what is cut off elsewhere
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    logits = decoder(**tokens, **{_argument(decoder): cache}, use_cache=True).logits
    present: dict[str, Any] = {}
    for number, layer in enumerate(cache.layers):
        for role in ("key", "value"):
            present[f"past_key_values.{number}.{role}"] = getattr(layer, f"{role}s", None)
    return logits, present


def _argument(decoder: Any) -> str:
    """What the decoder calls its cache, by the version of transformers."""
    known = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def with_cache(decoder: Any, batch: Inputs) -> tuple[WithCache, CacheInputs]:
    """A decoder and texts, as what is traced: the first half of the tokens is in the cache."""
    known = inspect.signature(decoder.forward).parameters
    if _argument(decoder) not in known or "use_cache" not in known or not hasattr(decoder, "config"):
        raise ExportError(f"cache=True is for decoders of transformers, not {type(decoder).__name__}: leave it out")
    ids = batch.tensors.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[1] < _FEWEST or batch.tensors.keys() - {"input_ids", "attention_mask"}:
        raise ExportError(
            f'cache=True needs texts of {_FEWEST} tokens or more: inputs={{"input_ids": ...}}, with "attention_mask" or '
            f"without; they have {', '.join(f'{name} {tuple(value.shape)}' for name, value in batch.tensors.items())}"
        )
    mask = batch.tensors.get("attention_mask", torch.ones_like(ids))
    tokens = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in known:
        tokens["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    half = ids.shape[1] // 2
    parts = [
        _keys_and_values(decoder, {name: value[:, :half] for name, value in part.items()}) for part in _rows(tokens)
    ]
    past = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    new = {name: value if name == "attention_mask" else value[:, half:].contiguous() for name, value in tokens.items()}
    return WithCache(decoder, list(new)), CacheInputs(new, past)


def _rows(tokens: dict[str, Tensor], count: int = 16) -> list[dict[str, Tensor]]:
    rows = len(tokens["input_ids"])
    return [{name: value[row : row + count] for name, value in tokens.items()} for row in range(0, rows, count)]


def _keys_and_values(decoder: Any, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    _, present = _run(decoder, tokens, [])
    rows, length = tokens["input_ids"].shape
    for value in present.values():
        if value is None or value.ndim != 4 or (value.shape[0], value.shape[2]) != (rows, length):
            raise ExportError(
                f"cache=True needs a decoder each of whose layers keeps its keys and values, (rows, heads, tokens, size); "
                f"{type(decoder).__name__} has others: leave it out"
            )
    if not present:
        raise ExportError(f"{type(decoder).__name__} filled no cache: leave cache=True out")
    return present


def name_dimensions(proto: Any) -> None:
    """The length of the mask, which is that of the cache and the new tokens, and of what comes out."""
    for value in (*proto.graph.input, *proto.graph.output):
        shape = value.type.tensor_type.shape.dim
        if value.name == "attention_mask":
            shape[1].dim_param = "total_sequence"
        elif value.name.startswith("present."):
            shape[2].dim_param = "total_sequence"
