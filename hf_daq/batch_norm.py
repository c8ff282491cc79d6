"""`reestimate_batch_norm`: statistics of the network as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import ModelError
from .model.batch import all_batches, run
from .nn.layers import evaluating
from .nn.memory import memory_reused
from .nn.observers import all_reduce


@memory_reused()
@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Take the running means and variances of batch normalization anew from batches, in place, and return the model.

        hf_daq.reestimate_batch_norm(model, [images])
        hf_daq.save_pretrained(model, "out")

    Useful after training, as the statistics of a network whose codes still moved are not those of its last codes, and after
    `calibrate` alone. Not after `reconstruct`, whose outputs are fitted to those of the float network, with the statistics
    of that. Every batch counts alike, so they should be as large as in training. All other modules are in evaluation
    mode. Under `torch.distributed` the statistics are the means of all batches of all ranks.

    Args:
        model: any model, quantized or not.
        batches: each what the model takes, a tensor, a mapping or a tuple of arguments.

    Raises:
        ModelError: no batches, or no batch normalization with running statistics. If anything raises, the statistics stay
        as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise ModelError(f"{type(model).__name__} has no batch normalization with running statistics")
    found = all_batches(model, batches, "reestimate_batch_norm")
    with evaluating(model), _averaging(norms):
        for batch in found:
            run(model, batch)
        _reduce([value for norm in norms for value in (norm.running_mean, norm.running_var)], len(found))
    return model


@contextmanager
def _averaging(norms: list[_BatchNorm]) -> Iterator[None]:
    """Inside, statistics are means over all batches; if anything raises, they are what they were."""
    before = [(norm.momentum, {name: value.clone() for name, value in norm.named_buffers()}) for norm in norms]
    kept = {"num_batches_tracked"}
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        yield
    except BaseException:
        kept |= {"running_mean", "running_var"}
        raise
    finally:
        for norm, (momentum, values) in zip(norms, before, strict=True):
            norm.momentum = momentum
            for name, value in norm.named_buffers():
                if name in kept:
                    value.copy_(values[name])


def _reduce(means: list[Any], batches: int) -> None:
    """From means over the batches of this rank to means over those of all ranks."""
    count = torch.tensor(float(batches), device=means[0].device, dtype=torch.float32)
    all_reduce(count, dist.ReduceOp.SUM)
    for value in means:
        value.mul_(batches)
        all_reduce(value, dist.ReduceOp.SUM)
        value.div_(count)
