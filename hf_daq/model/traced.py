"""First and last layers of a network, by what its forward computes: traced without inputs, by torch.fx."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import nn

from ..nn.layers import CONVOLUTIONS, evaluating
from .remembered import left_as_before


class _Tracer(torch.fx.Tracer):
    """Stops at the modules that have a weight."""

    def __init__(self, layers: set[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.layers or super().is_leaf_module(module, name)


def traced_ends(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[list[str], list[str]] | None:
    """Names of the layers that read an input of the model with no other layer between, and of those from which an output
    comes with no other layer after; None where the forward cannot be traced, as it looks at its inputs.

    Args:
        layers: those with a weight, by name.
    """
    try:
        with left_as_before(model), evaluating(model):
            graph = _Tracer(set(layers.values())).trace(model)
    except Exception:  # whatever the forward of a stranger does with what is no tensor
        return None
    inside = {node: _layers_of(node, layers) for node in graph.nodes}
    nodes = [node for node in graph.nodes if not _is_size(node)]
    reads: dict[Any, bool] = {}  # an input, without a layer between
    first: dict[str, None] = {}
    for node in nodes:
        before = node.all_input_nodes
        reads[node] = node.op == "placeholder" or any(reads.get(one) and not inside[one] for one in before)
        if reads[node] and inside[node]:
            first[inside[node][0]] = None
    feeds: dict[Any, bool] = {}  # another layer
    last: dict[str, None] = {}
    for node in reversed(nodes):
        feeds[node] = any(user in feeds and (inside[user] or feeds[user]) for user in node.users)
        if inside[node] and not feeds[node] and any(user in feeds for user in node.users):
            last[inside[node][-1]] = None
    return list(first), list(last)


def _is_size(node: torch.fx.Node) -> bool:
    """Whether a node gives what a tensor is like, not its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "type")


def _layers_of(node: torch.fx.Node, layers: dict[str, nn.Module]) -> list[str]:
    """The layers that a node calls, one or those inside of a module such as an attention, or whose parameters it reads."""
    if node.op not in ("call_module", "get_attr"):
        return []
    target = str(node.target)
    if node.op == "get_attr":
        target = target.rpartition(".")[0]
        return [target] if target in layers else []
    return [name for name in layers if name == target or name.startswith(target + ".")]


def likely_ends(layers: dict[str, nn.Module]) -> tuple[list[str], list[str]]:
    """As `traced_ends`, by the numbers of channels alone: convolutions that read channels which no layer gives, and layers
    that give channels which no layer reads, with the last layer. Rather one too many than one too few."""
    sizes = {name: _channels(module) for name, module in layers.items()}
    given = {size for _, size in sizes.values() if size}
    inputs = {name: sizes[name][0] for name, module in layers.items() if isinstance(module, CONVOLUTIONS)}
    open_inputs = {name: count for name, count in inputs.items() if count not in given} or inputs
    fewest = min(open_inputs.values(), default=0)
    first = [name for name, count in open_inputs.items() if count <= max(fewest, 4)] or list(layers)[:1]
    read = {size for name, (size, _) in sizes.items() if size and name not in first}
    wider = {
        size * parts for size in read for parts in (1, 2, 3, 4)
    }  # gates, and query, key and value, are read in parts
    last = [name for name, (_, size) in sizes.items() if size and size not in wider]
    last += [name for name in list(layers)[-1:] if name not in last]
    return first, [name for name in sizes if name in last or any(_is_branch_beside(name, one, sizes) for one in last)]


def _is_branch_beside(name: str, other: str, sizes: dict[str, tuple[int, int]]) -> bool:
    """Whether two layers are at the same place in two branches of a list, and what the one gives no branch reads."""
    parts, others = name.split("."), other.split(".")
    differ = [place for place, (one, two) in enumerate(zip(parts, others, strict=False)) if one != two]
    if len(parts) != len(others) or len(differ) != 1 or not (parts[differ[0]] + others[differ[0]]).isdigit():
        return False
    branches = ".".join(parts[: differ[0]]) + "."
    return all(size != sizes[name][1] for key, (size, _) in sizes.items() if key.startswith(branches))


def _channels(module: nn.Module) -> tuple[int, int]:
    """How many a layer reads and gives; 0 where it does not say so."""
    for one, other in (("in_features", "out_features"), ("in_channels", "out_channels"), ("nx", "nf")):
        if hasattr(module, one) and hasattr(module, other):
            return int(getattr(module, one)), int(getattr(module, other))
    for name in ("input_size", "embed_dim"):  # recurrent layers, attention
        if hasattr(module, name):
            return int(getattr(module, name)), 0
    return 0, 0
