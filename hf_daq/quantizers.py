"""The learnable quantizers of a layer: `WeightQuantizer` and `ActivationQuantizer`.

Their parameters have shape (1,) or (channels,) and dtype float32. They hold NaN until calibration or a state dict
gives them values; `calibrated` says which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .functional import quantize

_SMALLEST_SCALE = 1e-8


def _wide(tensor: Tensor) -> Tensor:
    """float32, or float64 for float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Quantizer(nn.Module):
    """Bounds `lower` < `upper` and what both sides share. Not used by itself."""

    def __init__(
        self, bits: int, size: int, rounding: str, gamma: float, sigma: float, temperature: float, device: Any
    ) -> None:
        super().__init__()
        self.bits = bits
        self.rounding = rounding
        self.gamma = gamma
        self.sigma = sigma
        self.temperature = temperature
        self.calibrated = False
        self.lower = nn.Parameter(torch.full((size,), torch.nan, device=device, dtype=torch.float32))
        self.upper = nn.Parameter(torch.full((size,), torch.nan, device=device, dtype=torch.float32))

    def finish(self) -> None:
        """Take note of values that were just written to the parameters."""
        if not self.lower.is_meta:
            values = torch.cat([parameter.detach().float() for parameter in self.parameters()])
            self.calibrated = bool(values.isfinite().all() and (self.lower < self.upper).all())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.finish()

    def _quantize(
        self, x: Tensor, lower: Tensor, upper: Tensor, center: Tensor | float, step: Tensor | float
    ) -> Tensor:
        # The soft quantizer trains one function and deploys another: rounding.
        rounding = "ste" if self.rounding == "soft" and not self.training else self.rounding
        return quantize(
            x,
            lower,
            upper,
            center=center,
            step=step,
            bits=self.bits,
            rounding=rounding,
            gamma=self.gamma,
            sigma=self.sigma,
            temperature=self.temperature,
        )

    def extra_repr(self) -> str:
        state = "" if self.calibrated else ", not calibrated"
        return f"bits={self.bits}, rounding={self.rounding!r}{state}"


class WeightQuantizer(Quantizer):
    """Weights of shape (channels, ...) to `|scale| * (2q - R) / R`: 2**bits symmetric values without a zero.

    lower, upper: bounds, shape (1,) or (channels,), in units of the weight's standard deviation around its mean
        (`normalization="standardize"`, the paper) or of its root mean square around zero ("scale"). These statistics
        are constants in the backward.
    scale: shape as the bounds; the paper's beta, the output scale of the layer, folded into the weight.
    shift: shape (channels,), added to the bias of the layer, or None.
    """

    def __init__(
        self,
        bits: int,
        channels: int,
        *,
        per_channel: bool = False,
        shift: bool = False,
        normalization: str = "scale",
        rounding: str = "daq",
        gamma: float = 2.0,
        sigma: float = 1.0,
        temperature: float = 4.0,
        device: Any = None,
    ) -> None:
        size = channels if per_channel else 1
        super().__init__(bits, size, rounding, gamma, sigma, temperature, device)
        self.normalization = normalization
        self.per_channel = per_channel
        self.scale = nn.Parameter(torch.full((size,), torch.nan, device=device, dtype=torch.float32))
        self.shift = (
            nn.Parameter(torch.full((channels,), torch.nan, device=device, dtype=torch.float32)) if shift else None
        )

    def shifted(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The bias of the quantized layer, in the dtype of its weight."""
        if self.shift is None:
            return bias
        shift = self.shift.to(dtype)
        return shift if bias is None else bias + shift

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and unit of the bounds for this weight, each broadcastable to it. No gradient."""
        weight = _wide(weight.detach())
        dims = tuple(range(1 if self.per_channel else 0, weight.ndim))
        if self.normalization == "standardize":
            count = weight[0].numel() if self.per_channel else weight.numel()
            std, mean = torch.std_mean(weight, dim=dims, keepdim=True, correction=min(1, count - 1))
            return mean, std.clamp_min(_SMALLEST_SCALE)
        unit = weight.square().mean(dim=dims, keepdim=True).sqrt().clamp_min(_SMALLEST_SCALE)
        return torch.zeros_like(unit), unit

    def forward(self, weight: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (weight.ndim - 1)
        offset, unit = self.statistics(weight)
        # Clipping (w - mean) / std to [l, u] is clipping w to [mean + std l, mean + std u].
        lower = offset + unit * _wide(self.lower).view(shape)
        upper = offset + unit * _wide(self.upper).view(shape)
        levels = 2**self.bits - 1
        step = _wide(self.scale).abs().view(shape) * (2 / levels)
        return self._quantize(weight, lower, upper, levels / 2, step)


class ActivationQuantizer(Quantizer):
    """Layer inputs of any shape to `(q - zero_point) / R`.

    lower, upper: bounds, shape (1,). `lower` is exactly 0 and frozen where calibration saw no negative value (the
        paper); else `signed` is True, both learn, and the bounds are moved so that the real zero is a code:
        `zero_point = round(-lower / (upper - lower) * R)`, with the identity as its gradient.
    """

    def __init__(
        self,
        bits: int,
        *,
        rounding: str = "daq",
        gamma: float = 2.0,
        sigma: float = 2.0,
        temperature: float = 4.0,
        device: Any = None,
    ) -> None:
        super().__init__(bits, 1, rounding, gamma, sigma, temperature, device)
        self.signed = True

    def finish(self) -> None:
        super().finish()
        if self.calibrated:
            self.signed = bool(self.lower != 0)
            self.lower.requires_grad_(self.signed)

    @property
    def span(self) -> Tensor:
        """Width of the quantized range, shape (1,): one unit of the output in units of the input."""
        return _wide(self.upper) - _wide(self.lower)

    def forward(self, x: Tensor) -> Tensor:
        levels = 2**self.bits - 1
        if not self.signed:
            return self._quantize(x, self.lower, self.upper, 0.0, 1 / levels)
        span = self.span
        step = span / levels
        exact = -_wide(self.lower) / step
        zero_point = exact + (exact.round().clamp(0, levels) - exact).detach()
        lower = -zero_point * step
        return self._quantize(x, lower, lower + span, zero_point, 1 / levels)
