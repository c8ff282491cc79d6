"""How a batch is given to a model, and its outputs taken."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ExportError, ModelError
from ..nn.observers import all_reduce


class Call(NamedTuple):
    """A call of a module that was recorded."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module


class Calls(tuple[Call, ...]):
    """Calls of a model or of its parts, one after the other."""


def run(model: nn.Module, batch: Any) -> Any:
    """A forward of a tensor, a mapping or a tuple, whose output is returned, or recorded calls."""
    if isinstance(batch, Calls):
        for call in batch:
            call.module(*copied(call.args), **copied(call.kwargs))
        return None
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*(batch if isinstance(batch, tuple) else (batch,)))


def copied(values: Any) -> Any:
    """A copy of arguments that no loader writes over, and to which a model may write, as it does to key-value caches. What has no
    copy, as a file, is itself in it."""

    def copied_leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        try:
            return copy.deepcopy(value)
        except (TypeError, RuntimeError):  # of pickle, or of a tensor with a graph
            return value

    return pytree.tree_map(copied_leaf, values, is_leaf=is_cache)


def is_cache(value: Any) -> bool:
    """Whether it is a key-value cache of transformers."""
    return hasattr(value, "get_seq_length")


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Inside, decoders keep no keys and values."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    kept = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        for config in kept:
            config.use_cache = False
        yield
    finally:
        for config in kept:
            config.use_cache = True


def on_device_of(model: nn.Module, batch: Any) -> Any:
    """A batch with its tensors where the model has its first parameter."""
    device = next(model.parameters()).device
    return pytree.tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)


_WITHOUT_LABELS = "; labels do not go into the model: [images for images, labels in loader]"


def examples_in(batch: Any) -> int:
    """Length of the first tensor."""
    if not isinstance(batch, Tensor | Mapping | tuple):
        raise ModelError(
            f"batch is a {type(batch).__name__}; pass a tensor, a mapping of tensors as tokenizers give it, or a tuple of "
            f"positional arguments{_WITHOUT_LABELS if isinstance(batch, list) else ''}"
        )
    if isinstance(batch, Calls):
        return max(examples_in((*call.args, *call.kwargs.values())) for call in batch)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim > 0), 1)


_BATCH = 16
_AT_ONCE = 32
_IMAGES = 8


class Inputs:
    """The inputs of a model as a tuple or a mapping of tensors."""

    def __init__(self, inputs: Any) -> None:
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        self.named = isinstance(inputs, Mapping)
        if not isinstance(inputs, Mapping | Sequence):
            raise ExportError(f"inputs must be a tensor, a tuple or a mapping of tensors, not {type(inputs).__name__}")
        self.tensors: dict[Any, Tensor] = dict(inputs if self.named else enumerate(inputs))
        if not self.tensors or not all(isinstance(value, Tensor) and value.ndim for value in self.tensors.values()):
            raise ExportError("inputs must be a tensor, a tuple or a mapping of tensors, the first dimension rows")
        for name, value in self.tensors.items():
            if value.isnan().any():
                raise ExportError(f"input {name!r} has NaN: export with real data, as the model was calibrated with")
        counts = {len(value) for value in self.tensors.values()}
        if len(counts) > 1 or min(counts) < 2:
            raise ExportError(f"inputs need two rows at least, the same number in each; they have {sorted(counts)}")
        self.rows = counts.pop()

    def to(self, device: torch.device) -> None:
        self.tensors = {key: value.detach().to(device) for key, value in self.tensors.items()}

    def part(self, rows: slice) -> list[Tensor]:
        return [value[rows] for value in self.tensors.values()]

    def batches(self) -> Iterator[list[Tensor]]:
        for start in range(0, self.rows, _BATCH):
            yield self.part(slice(start, start + _BATCH))

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((), dict(zip(self.tensors, tensors, strict=True))) if self.named else (tuple(tensors), {})

    def shapes(self, sequence: bool, size: bool) -> Any:
        """Free dimensions: the rows, with `sequence` the columns of tokens, with `size` height and width of images."""
        rows, columns, free = torch.export.Dim("batch"), torch.export.Dim("sequence"), torch.export.Dim.DYNAMIC
        shapes = {}
        for key, value in self.tensors.items():
            more = {1: columns} if sequence and _are_tokens(value) else {}
            shapes[key] = {0: rows} | ({2: free, 3: free} if size and are_images(value) else more)
        return shapes if self.named else tuple(shapes.values())

    @property
    def names(self) -> list[str] | None:
        """Those of the inputs of a file, where they are not the ones that tracing finds."""
        return None

    @property
    def tokens(self) -> bool:
        return any(map(_are_tokens, self.tensors.values()))


def are_images(value: Tensor) -> bool:
    return value.ndim == 4 and value.is_floating_point()


def _are_tokens(value: Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point()


def outputs_of(model: nn.Module, batch: Inputs, tensors: list[Tensor]) -> list[Tensor]:
    args, kwargs = batch.arguments(tensors)
    return tensors_in(model(*args, **kwargs))


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of what a model returns, also those in a dataclass."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def all_batches(model: nn.Module, batches: Iterable[Any], what: str) -> list[Any]:
    """All batches of this rank; a rank may have none, if another one has some."""
    if isinstance(batches, Tensor | Mapping):
        raise ModelError(f"batches is one {type(batches).__name__}; write hf_daq.{what}(model, [batch])")
    found = [batch for batch in batches if examples_in(batch) > 0]
    for batch in found[:1]:
        check_taken(model, batch)
    total = torch.tensor(len(found), device=next(model.parameters()).device)
    all_reduce(total, dist.ReduceOp.SUM)
    if int(total) == 0:
        raise ModelError(f"{what} got no batches; pass a list of a few hundred inputs in batches, as for calibrate")
    return found


def check_taken(model: nn.Module, batch: Any) -> None:
    """Refuse a tuple of another number of values than the model takes, as images with their labels."""
    if isinstance(batch, tuple) and not isinstance(batch, Calls):
        try:
            inspect.signature(model.forward).bind(*batch)
        except TypeError as error:
            raise ModelError(
                f"the model does not take batches of {len(batch)} values, {error}{_WITHOUT_LABELS}"
            ) from None


def resized(batches: list[Any]) -> list[Any]:
    """At most some dozen batches, as each takes two threads, where neighbours of the same shape can become one; images as few at a
    time as this allows: activations of hundreds of MB come from the system anew, which takes longer than to compute them."""
    most = max(_IMAGES, -(-sum(map(examples_in, batches)) // _AT_ONCE))
    parts = [part for batch in batches for part in _parts(batch, most)]
    size = -(-len(parts) // _AT_ONCE)
    found: list[Any] = []
    for _, alike in groupby(parts, _form):
        same = list(alike)
        found += [_concatenated(same[start : start + size]) for start in range(0, len(same), size)]
    return found


def _parts(batch: Any, most: int) -> list[Any]:
    """Images in parts of about `most`, any other batch as it is: its first dimension may be one of tokens."""
    values = list(batch.values()) if isinstance(batch, Mapping) else [batch]
    if not isinstance(_form(batch), list) or not any(map(are_images, values)):
        return [batch]
    number = -(-len(values[0]) // most)
    if isinstance(batch, Tensor):
        return list(batch.tensor_split(number))
    split = {name: value.tensor_split(number) for name, value in batch.items()}
    return [{name: parts[place] for name, parts in split.items()} for place in range(number)]


def _form(batch: Any) -> Any:
    """Equal for batches that can be one; of others it is never equal."""
    values = batch if isinstance(batch, Mapping) else {"": batch}
    tensors = all(isinstance(value, Tensor) and value.ndim > 0 for value in values.values())
    if not tensors or len({len(value) for value in values.values()}) != 1:
        return object()
    return [(name, value.shape[1:], value.dtype) for name, value in values.items()]


def _concatenated(batches: list[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], Tensor):
        return torch.cat(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
