"""A weight that is computed when it is read: what is written to it would be lost."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ModelError

_WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class ComputedWeight(Tensor):
    """Refuses to be written to. What is computed with it is a plain tensor.

    problem: the error's text.
    """

    problem: ClassVar[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place or name in _WRITING or func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise ModelError(cls.problem)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
