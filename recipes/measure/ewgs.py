"""Element-wise gradient scaling (Lee, Kim, Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021), for
comparison: the third estimator of estimators.py, between the bounds of hf_daq's quantizers.

With x_n the value between the bounds, from 0 to 1, x_q the rounded one, and g_xq the gradient of the rounded one:

    g_xn = g_xq * (1 + delta * sign(g_xq) * (x_n - x_q))
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_daq.nn.quantizers import ActivationQuantizer, WeightQuantizer


class _Discretize(torch.autograd.Function):
    """Round v, from 0 to R, ties down."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, levels: int, delta: float) -> Tensor:
        code = (v - 0.5).ceil()
        ctx.save_for_backward(v - code)
        ctx.scale = delta / levels
        return code

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (error,) = ctx.saved_tensors
        return grad + ctx.scale * grad.abs() * error, None, None


class EwgsWeights(WeightQuantizer):
    delta: float

    def forward(self, weight: Tensor) -> Tensor:
        offset, unit = self.statistics(weight)
        bounds = (offset + unit * bound.view_as(offset) for bound in (self.lower, self.upper))
        code = self._codes(weight, *bounds)
        return ((code - self.center) * (self.scale.abs() / self.center).view_as(offset)).to(self.result_dtype(weight))

    def _codes(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        inside = (x >= start) & (x <= end)
        v = torch.where(inside, (x - start) / (end - start), (x > end).to(start.dtype)) * self.levels
        return _Discretize.apply(v, self.levels, self.delta)


class EwgsInputs(ActivationQuantizer):
    delta: float
    _codes = EwgsWeights._codes

    def rounded(self, x: Tensor) -> Tensor:
        upper = self.upper.to(torch.promote_types(x.dtype, torch.float32))
        return (self._codes(x, torch.zeros_like(upper), upper) / self.levels).to(self.result_dtype(x))


def use_ewgs(model: nn.Module, delta: float) -> None:
    """Give the quantizers of a calibrated model (weights per tensor or channel, inputs that are never negative) this gradient."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer) and module.signed:
            raise ValueError("EWGS is written for inputs that are never negative, such as those after a ReLU")
        for kind, other in ((WeightQuantizer, EwgsWeights), (ActivationQuantizer, EwgsInputs)):
            if type(module) is kind:
                module.__class__, module.delta = other, delta
