"""Kernels: functions of tensors compiled by torch's inductor, where there is a compiler."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("hf_daq")
_said: list[str] = []


@cache
def available(device_type: str) -> bool:
    """Whether kernels for this device can be compiled here: never on Windows, nor with `HF_DAQ_COMPILE=0`."""
    if os.environ.get("HF_DAQ_COMPILE", "1") == "0" or sys.platform == "win32":
        return False
    if device_type == "cuda":
        return find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)
    return device_type == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


class Kernels:
    """Compiles `function` once for each combination of constants, dtypes, devices and numbers of dimensions; the code
    serves all sizes, and is kept on disk.

    It is called without `torch.compile`, whose guards take longer than the kernel of a small layer. So nobody checks
    that later tensors are like those it was compiled for. They must be contiguous and have less than 2**31 elements, and
    sizes must be above 1 where those of `shapes` are.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.found: dict[Any, Callable[..., Any]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], constants: tuple[Any, ...], shapes: tuple[Any, ...]) -> Any:
        """`function(*tensors, *constants)`.

        Args:
            shapes: of tensors to compile with, all different where sizes may differ.
        """
        key = (*constants, *shapes, *(tensor.dtype for tensor in tensors), tensors[0].device)
        kernel = self.found.get(key)
        if kernel is None:
            kernel = self.found[key] = self._compiled(tensors, constants, shapes)
        return kernel(*tensors)

    def _compiled(
        self, tensors: tuple[Tensor, ...], constants: tuple[Any, ...], shapes: tuple[Any, ...]
    ) -> Callable[..., Any]:
        def function(*tensors: Tensor) -> Any:
            return self.function(*tensors, *constants)

        _say("compiling quantizers: some seconds now, less the next time; HF_DAQ_COMPILE=0 does without")
        try:
            import torch._inductor  # not before it is needed: this takes a second or two
            from torch.fx.experimental.proxy_tensor import make_fx

            examples: list[Any] = [tensor.new_empty(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
            with torch.autocast(tensors[0].device.type, enabled=False):
                graph = make_fx(function, tracing_mode="symbolic")(*examples)
                # Precompiled headers cost more than they save a handful of kernels.
                options = {"config_patches": {"cpp_cache_precompile_headers": False}}
                compiled = torch._inductor.standalone_compile(graph, examples, options=options)
            compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _say(f"quantizers are not compiled, and slower for it: {reason}")
            return function
        return compiled


def _say(text: str) -> None:
    """Tell the user once in this process, and on one process of a machine."""
    if text not in _said and os.environ.get("LOCAL_RANK", "0") == "0":
        _said.append(text)
        logger.warning(text)
