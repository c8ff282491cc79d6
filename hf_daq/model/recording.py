"""What goes through a model from outside: its calls, whichever module they start at, and the mask of their tokens."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ModelError
from ..nn.base import INSIDE
from ..nn.layers import quantized_layers
from .batch import Call, Calls, copied, examples_in, is_cache


class _Around(threading.local):
    """What is around the module that runs, in each thread: the attention mask in force, and those of the modules around."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.open: list[Tensor | None] = []


class Recorder:
    """Hooks on all modules of a model, until `remove`.

    mask: the attention mask in force, shape (batch, tokens), None without one; each thread has its own. calls: a copy of the last call of each
        module that was called from outside of the model and has quantized layers, for `run`.
    """

    def __init__(self, model: nn.Module, keep_calls: bool) -> None:
        self._around = _Around()
        self._last: dict[nn.Module, Call] = {}
        self._hooks = []
        for module in model.modules():
            keep = keep_calls and bool(quantized_layers(module))
            before = self._before(keep, _mask_position(module))
            self._hooks += [
                module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._after, always_call=True),
            ]

    def __reduce__(self) -> str:
        """A copy of the model would keep these hooks for ever."""
        raise ModelError(INSIDE)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def mask(self) -> Tensor | None:
        return self._around.mask

    @property
    def calls(self) -> Calls:
        return Calls(self._last.values())

    def _before(self, keep: bool, position: int | None) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            around = self._around
            if keep and not around.open and examples_in((*args, *kwargs.values())) > 0 and not _continues(args, kwargs):
                self._last.pop(module, None)
                self._last[module] = Call(copied(args), copied(kwargs), module)
            around.open.append(around.mask)
            if position is not None:
                found = args[position] if 0 <= position < len(args) else kwargs.get("attention_mask")
                if found is None or (isinstance(found, Tensor) and found.ndim == 2):
                    around.mask = found if found is not None and not found.is_floating_point() else None

        return hook

    def _after(self, *_: Any) -> None:
        self._around.mask = self._around.open.pop()

    def attended(self, x: Tensor) -> Tensor:
        """The inputs of a layer without those of padding tokens."""
        kept = self.kept(x)
        return x if kept is None else x[kept]

    def kept(self, x: Tensor) -> Tensor | None:
        """Which positions of the inputs of a layer are no padding, bool, shape (batch, tokens), or (batch * tokens,) where the
        inputs are rows of tokens; None for all."""
        mask = self.mask
        if mask is None or x.ndim != 3 or mask.shape != x.shape[:2]:
            return self.kept_tokens(len(x), x.device) if x.ndim == 2 else None
        return mask.to(x.device) > 0

    def kept_tokens(self, count: int, device: torch.device) -> Tensor | None:
        """The same for so many tokens, all sequences one after the other."""
        mask = self.mask
        return None if mask is None or mask.numel() != count else mask.flatten().to(device) > 0


def _mask_position(module: nn.Module) -> int | None:
    """Where the module takes an attention mask: the position, -1 if it never does; None if masks are not its concern."""
    names = list(inspect.signature(module.forward).parameters)
    if "attention_mask" in names:
        return names.index("attention_mask")
    return -1 if "pixel_values" in names else None


def _continues(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call has a key-value cache with tokens in it, which are too many to copy at every step."""
    values = pytree.tree_leaves((args, kwargs), is_leaf=is_cache)
    return any(is_cache(value) and value.get_seq_length() > 0 for value in values)
