"""The configs of a transformers model, which other models may hold too, are its own while it is quantized."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig


def copy_configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """Give every module of a model a copy of its config, as other models may hold the same object; modules that shared one,
    or a part of one, still do.

    Returns:
        The copies and what they are copies of, for `give_configs_back`.
    """
    copies: dict[int, Any] = {}
    originals: list[tuple[Any, Any]] = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                own = vars(module)[name] = copy.deepcopy(value, copies)
                originals.append((own, value))
    return originals


def give_configs_back(model: nn.Module, originals: Sequence[tuple[Any, Any]]) -> None:
    """Inverse of `copy_configs`, unless a config has changed since."""
    if any(own.to_dict() != original.to_dict() for own, original in originals):
        return
    found = {id(own): original for own, original in originals}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in found:
                vars(module)[name] = found[id(value)]
