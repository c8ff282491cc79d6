"""`reestimate_batch_norm`: statistics of the network as it is now."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import CalibrationError, ModelError
from .model.batch import all_batches, run
from .nn.layers import evaluating
from .nn.memory import memory_reused
from .nn.observers import all_reduce
from .nn.sums import finite

logger = logging.getLogger("hf_daq")


@memory_reused()
@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Take the running means and variances of batch normalization anew from batches, in place, and return the model.

        hf_daq.reestimate_batch_norm(model, [images])
        hf_daq.save_pretrained(model, "out")

    Useful after training, as the statistics of a network whose codes still moved are not those of its last codes, and after
    `calibrate` alone. Not after `reconstruct`, whose outputs are fitted to those of the float network, with the statistics
    of that. Every batch counts alike, so they should be as large as in training. All other modules are in evaluation
    mode. What no batch reaches, as heads that run in training alone, keeps its statistics, which is logged. Under
    `torch.distributed` the statistics are the means of all batches of all ranks.

    Args:
        model: any model, quantized or not.
        batches: each what the model takes, a tensor, a mapping or a tuple of arguments.

    Raises:
        ModelError: no batches, one with one value a channel, or no batch normalization with running statistics. CalibrationError:
        inputs that are not finite. If anything raises, the statistics stay as they were.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    if not norms:
        raise ModelError(f"{type(model).__name__} has no batch normalization with running statistics")
    found = all_batches(model, batches, "reestimate_batch_norm")
    with evaluating(model), _averaging(norms):
        for batch in found:
            try:
                run(model, batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise ModelError(
                    "a batch has one value a channel, which has no variance: leave out the last batch where it is that short, "
                    "DataLoader(..., drop_last=True)"
                ) from error
    return model


@contextmanager
def _averaging(norms: dict[str, _BatchNorm]) -> Iterator[None]:
    """Inside, statistics are means over all batches; of those that no batch reaches, and of all if anything raises, they are what
    they were."""
    before = {
        name: (norm.momentum, {key: value.clone() for key, value in norm.named_buffers()})
        for name, norm in norms.items()
    }
    reached: set[str] = set()
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        yield
        found = {name for name, norm in norms.items() if _reduce(norm) > 0}
        for name in sorted(found):
            if not all(map(finite, norms[name].buffers())):
                raise CalibrationError(f"the inputs of batch normalization {name!r} have NaN or infinite values")
        reached = found
        if left := [name for name in norms if name not in reached]:
            logger.warning("batch normalization that no batch reached keeps its statistics: %s", ", ".join(left))
    finally:
        for name, (momentum, values) in before.items():
            norms[name].momentum = momentum
            for key, value in norms[name].named_buffers():
                if name not in reached or key == "num_batches_tracked":
                    value.copy_(values[key])


def _reduce(norm: Any) -> float:
    """From means over the batches of this rank to means over those of all ranks, whose count is returned."""
    own = norm.num_batches_tracked.float()
    count = own.clone()
    all_reduce(count, dist.ReduceOp.SUM)
    for value in (norm.running_mean, norm.running_var):
        value.mul_(own)
        all_reduce(value, dist.ReduceOp.SUM)
        value.div_(count.clamp_min(1))
    return float(count)
