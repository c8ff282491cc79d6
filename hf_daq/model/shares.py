"""Which parameters of a planned model stay in float, and what would quantize them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..nn.attention import Projection
from ..nn.experts import ExpertsLinear

SMALL = 0.5  # share of the parameters: where less is quantized, the largest of the rest are named
_SHOWN = 3


@dataclass(frozen=True)
class InFloat:
    """Parameters that stay in float for one reason. line: what quantizes them, or "". asked: whether the config says so."""

    what: str
    parameters: int
    line: str = ""
    asked: bool = False


def in_float(rows: Iterable[Any], modules: Mapping[str, nn.Module], total: int, quantized: int) -> tuple[InFloat, ...]:
    """All parameters that are not quantized, the largest part first.

    Args:
        rows: the layers in float, as `PlannedLayer`. modules: by their names. total, quantized: numbers of parameters.
    """
    counts: dict[InFloat, int] = {}
    seen: dict[int, Tensor] = {}
    # What an output embedding shares with an embedding is the embedding's.
    for row in sorted(rows, key=lambda row: not isinstance(modules[row.name], nn.Embedding)):
        own = {id(value): value for value in _own(modules[row.name]) if id(value) not in seen}
        part = _part(row, modules[row.name])
        counts[part] = counts.get(part, 0) + sum(value.numel() for value in own.values())
        seen |= own
    other = InFloat("norms, biases and other parameters", total - quantized - sum(counts.values()))
    parts = [InFloat(part.what, count, part.line, part.asked) for part, count in counts.items()]
    return tuple(sorted((part for part in (*parts, other) if part.parameters), key=lambda part: -part.parameters))


def _part(row: Any, module: nn.Module) -> InFloat:
    if row.unsupported:
        return InFloat(f"{row.kind} ({row.reason})", 0)
    if row.reason.startswith(("modules_to_not_convert", "rule ", "resolved before")):
        return InFloat("layers that the config leaves out", 0, asked=True)
    if row.reason == "embedding":
        return InFloat("embeddings", 0, "embedding_bits=4")
    if row.reason == "router" or isinstance(module, nn.Embedding):
        return InFloat(f"{row.reason}s" if row.reason == "router" else row.reason, 0)
    if row.reason.startswith("shares its weight"):
        return InFloat("layers that share their weight", 0)
    first = row.reason.startswith("first layer")
    return InFloat("first layers" if first else "heads", 0, "first_last_bits=8")


def _own(module: Any) -> list[Tensor]:
    if isinstance(module, Projection):
        return module.float_values()
    if isinstance(module, ExpertsLinear):
        return [value for value in (module.weight, module.bias) if value is not None]
    return list(module.parameters(recurse=is_parametrized(module)))


def too_little(parts: Iterable[InFloat], total: int) -> bool:
    """Whether less than half of the parameters are quantized, of those that the config does not leave out itself."""
    parts = list(parts)
    wanted = total - sum(part.parameters for part in parts if part.asked)
    return sum(part.parameters for part in parts if not part.asked) > (1 - SMALL) * wanted


def rest_text(parts: Iterable[InFloat], total: int) -> str:
    """The largest parts with their share and the line that quantizes them."""
    return ", ".join(
        f"{part.what} {part.parameters / total:.1%}" + (f" ({part.line} quantizes them)" if part.line else "")
        for part in list(parts)[:_SHOWN]
    )
