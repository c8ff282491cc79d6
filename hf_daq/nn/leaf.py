"""How other tools see a quantized or packed layer: as one leaf, like the float layer it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch.fx
from torch import nn

from ..errors import ModelError

ONLOAD = "first write accelerate.hooks.remove_hook_from_submodules(model)"  # where the weights of a model are elsewhere


_DEVICE_MAPS = {"accelerate.utils.modeling", "accelerate.hooks"}


class Leaf(nn.Module):
    """A layer whose parts stay together: on one device of Accelerate's device maps, and in one node of a graph of
    torch.fx."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The quantizers, for all but Accelerate's device maps, whose names have no other way to keep a layer whole."""
        caller = sys._getframe(1).f_globals.get("__name__")
        return iter(()) if caller in _DEVICE_MAPS else super().named_children()

    def __prepare_scriptable__(self) -> NoReturn:
        raise ModelError(
            "torch.jit.script cannot compile quantized layers; write hf_daq.export_onnx(model, path, inputs), or "
            "torch.export.export"
        )


def traced(layer: nn.Module, x: torch.fx.Proxy) -> Any:
    """The node that calls a layer, in a graph that is being traced."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {})  # type: ignore[attr-defined]
