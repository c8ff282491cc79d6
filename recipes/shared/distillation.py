"""Training towards the outputs of the float network."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Distillation:
    """The float network as a teacher: (1 - alpha) * cross-entropy + alpha * temperature^2 * KL to its outputs, + features *
    mean squared distance of what goes into the last layer from what goes into the teacher's (feature distillation as of Zhu,
    He, Wu, "Quantized Feature Distillation for Network Quantization", AAAI 2023)."""

    alpha: float = 0.0
    """Share of the comparison with the float network in the loss of the DAQ phase; 0 for none."""
    temperature: float = 4.0
    """Divides the outputs of both networks before the comparison."""
    features: float = 0.0
    """Factor of the distance of the last features; 0 for none."""

    @property
    def wanted(self) -> bool:
        return self.alpha > 0 or self.features > 0


@contextmanager
def last_features(settings: Distillation, *networks: nn.Module) -> Iterator[list[Tensor]]:
    """Gives a list to which each forward inside adds what goes into the last layer of these networks, which are not wrapped; it
    stays empty where no features are compared."""
    found: list[Tensor] = []
    layers = [last_layer(network) for network in networks] if settings.features else []
    hooks = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0])) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def last_layer(network: nn.Module) -> nn.Module:
    """The classifier of a network of timm, or else the last linear layer."""
    found = network.get_classifier() if hasattr(network, "get_classifier") else None
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return found if isinstance(found, nn.Module) else layers[-1]


def distill(
    loss: Tensor, logits: Tensor, teacher_logits: Tensor, settings: Distillation, features: Sequence[Tensor] = ()
) -> Tensor:
    """The loss with the comparison of outputs, and of features: those of the student and of the teacher, or none."""
    alpha, temperature = settings.alpha, settings.temperature
    if alpha:
        loss = (1 - alpha) * loss + alpha * temperature**2 * divergence(logits, teacher_logits, temperature)
    if features:
        student, teacher = (value.float() for value in features)
        loss = loss + settings.features * F.mse_loss(student, teacher)
    return loss


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the outputs, shape (..., classes), from the teacher's: the mean over all predictions."""
    student = F.log_softmax(logits.float().flatten(0, -2) / temperature, 1)
    teacher = F.log_softmax(teacher_logits.float().flatten(0, -2) / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def train_towards(
    teacher: nn.Module,
    model: nn.Module,
    groups: list[dict[str, Any]],
    batches: Iterator[Any],
    forward: Callable[[nn.Module, Any], Tensor],
    share_done: Callable[[int], float],
) -> int:
    """Train without labels (AdamW, cosine to 0). Returns the number of updates.

    Args:
        groups: parameters of the model with their peak learning rates, as of `hf_daq.param_groups`.
        forward: network and batch -> logits.
        share_done: number of updates -> which share of the training is over; 1 ends it.
    """
    optimizer, updates = torch.optim.AdamW(groups), 0
    peaks = [group["lr"] for group in optimizer.param_groups]
    while (done := share_done(updates)) < 1:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * done))
        batch = next(batches)
        with torch.no_grad():
            target = forward(teacher, batch)
        divergence(forward(model, batch), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
    return updates
