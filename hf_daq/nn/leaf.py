"""How other tools see a quantized or packed layer: as one leaf, like the float layer it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch.fx
from torch import nn

from ..errors import ModelError

ONLOAD = "first write accelerate.hooks.remove_hook_from_submodules(model)"  # where the weights of a model are elsewhere


class Leaf(nn.Module):
    """A layer whose parts stay together: on one device of Accelerate's device maps, which go by `named_children`, and in one
    node of a graph of torch.fx."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        """The quantizers: `train`, `to` and `apply` go by these."""
        return (child for child in self._modules.values() if child is not None)

    def __prepare_scriptable__(self) -> NoReturn:
        raise ModelError(
            "torch.jit.script cannot compile quantized layers; write hf_daq.export_onnx(model, path, inputs), or "
            "torch.export.export"
        )


def traced(layer: nn.Module, x: torch.fx.Proxy) -> Any:
    """The node that calls a layer, in a graph that is being traced."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {})  # type: ignore[attr-defined]
