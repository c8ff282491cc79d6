"""A weight that is computed when it is read: what is written to it would be lost."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ModelError

_WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class ComputedWeight(Tensor):
    """Refuses to be written to, as do its `data` and other views of it. What is computed with it is a plain tensor.

    problem: the error's text.
    """

    problem: ClassVar[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        writes = in_place or name in _WRITING or func == Tensor.data.__set__  # type: ignore[attr-defined]
        target = args[0] if args else next(iter(named.values()), None)
        if any(isinstance(tensor, cls) for tensor in _tensors(target if writes else named.get("out"))):
            raise ModelError(cls.problem)
        if name == "__deepcopy__":
            return args[0].as_subclass(Tensor).clone()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **named)
            weights = [value for value in args if isinstance(value, cls)]
            if type(result) in (tuple, list):
                return type(result)(cls._viewed(part, weights) for part in result)
            return cls._viewed(result, weights)

    @classmethod
    def _viewed(cls, result: Any, weights: list[Any]) -> Any:
        owners = [weight for weight in weights if type(result) is Tensor and _same_memory(result, weight)]
        if not owners:
            return result
        view = result.as_subclass(cls)
        # transformers initializes what is not
        view._is_hf_initialized = getattr(owners[0], "_is_hf_initialized", False)
        return view


def _tensors(value: Any) -> Any:
    return value if isinstance(value, (tuple, list)) else (value,)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    strided = one.layout == other.layout == torch.strided
    return strided and one.untyped_storage()._cdata == other.untyped_storage()._cdata
