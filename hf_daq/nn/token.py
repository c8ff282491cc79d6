"""`TokenQuantizer`: layer inputs with a scale for each row, found while the layer computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formula import constants_of, token_positions, token_scale
from .functional import quantize_tokens
from .quantizers import Quantizer, wide


class TokenQuantizer(Quantizer):
    """Layer inputs of shape (..., columns) to multiples of a scale for each row, `quantize_tokens`. It has no parameters and
    needs no calibration.

    It has what `ActivationQuantizer` has besides bounds: its outputs are in units of the input, so `span` is 1. Its codes
    are unsigned, with the zero in the middle.
    """

    calibrated = True
    smooth = None

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
        super().__init__(bits, rounding, gamma, sigma, temperature)

    @property
    def zero_point(self) -> int:
        """The code of the real zero."""
        return (self.levels + 1) // 2

    @property
    def span(self) -> Tensor:
        """1, shape (): outputs are in units of the input."""
        return torch.ones((), dtype=torch.float32)

    def finish(self, loaded: bool = False) -> None:
        """Nothing: there are no values."""

    def scale(self, x: Tensor) -> Tensor:
        """Of each row, shape (..., 1)."""
        return token_scale(x.detach(), self.levels)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes of inputs, uint8 of their shape; `forward` gives `(codes - zero_point) * scale`."""
        return self.coded(x)[0]

    @torch.no_grad()
    def coded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`codes` and `scale`."""
        scale = self.scale(x)
        # Not from positions: adding the zero point first would round what lies next to a tie.
        codes = torch.mul(x, 1 / scale).round_().add_(self.zero_point).clamp_(0, self.levels)
        return codes.to(torch.uint8), scale

    @torch.no_grad()
    def positions(self, x: Tensor) -> Tensor:
        """Where inputs lie between the codes, before rounding."""
        return token_positions(wide(x), 1 / self.scale(x), constants_of(True, self.bits, self.gamma, self.sigma))

    def outside(self, positions: Tensor) -> Tensor:
        """Which values are clipped: none by more than half a step."""
        return torch.zeros_like(positions, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        return quantize_tokens(x, **self._options(x))
