"""How much what a network gives depends on each position of the outputs of its convolutions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nn.layers import CONVOLUTIONS
from ..nn.observers import all_reduce
from .batch import Calls, run, tensors_in

logger = logging.getLogger("hf_daq")
_LEAST = 0.1  # of the mean

Weights = dict[nn.Module, Tensor]
"""Of a batch: layer -> how much each position counts, shape (examples, positions), float32, on average about 1."""


def weighs_positions(layer: nn.Module) -> bool:
    """Whether positions of its output count differently: of convolutions whose outputs see all channels. In depthwise ones the channels
    of a position, each fitted by itself, are too different."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == 1


class Sensitivity:
    """Gradients of a random projection of the outputs, with respect to the outputs of these layers, which give them to `watched`."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = [layer for layer in layers if weighs_positions(layer)]
        self._found: Weights = {}

    def watched(self, layer: Any, output: Tensor) -> Tensor:
        """The output of a layer in a forward, as it is."""
        if layer in self.layers and output.requires_grad and output.ndim == len(layer.kernel_size) + 2:
            output.register_hook(lambda gradient: self._note(layer, gradient))  # type: ignore[no-untyped-call]
        return output

    def _note(self, layer: nn.Module, gradient: Tensor) -> None:
        self._found[layer] = torch.linalg.vector_norm(gradient.detach().float(), dim=1).flatten(1)

    def weights(self, model: nn.Module, batches: Sequence[Any], show: Callable[[str], Any]) -> list[Weights]:
        """For each batch; without layers whose gradient is missing or not finite on any rank."""
        found: list[Weights] = []
        sums = torch.zeros(len(self.layers), 2, device=next(model.parameters()).device, dtype=torch.float64)
        try:
            for batch in batches:
                show("sensitivity of positions")
                try:  # CPUs have faster gradients in this order, and some networks do not take it
                    found.append(self._of_batch(model, batch, torch.channels_last))
                except RuntimeError:
                    found.append(self._of_batch(model, batch, torch.contiguous_format))
                for total, layer in zip(sums, self.layers, strict=True):
                    if layer in found[-1]:
                        total += torch.stack(
                            [found[-1][layer].double().sum(), total.new_tensor(found[-1][layer].numel())]
                        )
        except (RuntimeError, NotImplementedError) as error:
            logger.info("all positions count alike, as the network has no gradient: %s", str(error).partition("\n")[0])
            found, sums = [{} for _ in batches], sums.fill_(torch.nan)
        all_reduce(sums, dist.ReduceOp.SUM)
        means = {layer: float(total / count) for layer, (total, count) in zip(self.layers, sums, strict=True)}
        return [
            {
                layer: (value / means[layer] + _LEAST) / (1 + _LEAST)
                for layer, value in weights.items()
                if 0 < means[layer] < math.inf
            }
            for weights in found
        ]

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _of_batch(self, model: nn.Module, batch: Any, order: torch.memory_format) -> Weights:
        self._found = {}
        leaves: list[Tensor] = []

        def with_gradient(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            form = order if value.ndim == 4 else torch.contiguous_format
            leaves.append(value.detach().clone(memory_format=form).requires_grad_())
            return leaves[-1].clone()  # a model may write to its inputs

        if isinstance(batch, Calls):
            return {}
        outputs = [
            value for value in tensors_in(run(model, pytree.tree_map(with_gradient, batch))) if value.requires_grad
        ]
        if leaves and outputs:
            generator = torch.Generator().manual_seed(0)
            along = [torch.randn(value.shape, generator=generator).to(value) for value in outputs]
            torch.autograd.grad(outputs, leaves, along, allow_unused=True)
        return self._found
