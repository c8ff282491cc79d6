"""Small networks for the tests."""

import timm
import torch
from torch import Tensor, nn

import hf_daq


class SmallNet(nn.Module):
    """Convolutions (plain, depthwise, grouped) with and without a non-negative input, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 16, 1, groups=2)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.features(x).mean((2, 3))))

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu()))
        return self.grouped(nn.functional.gelu(self.depthwise(x)))


def small_net(seed: int = 0) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet().eval()


def small_timm(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs).eval()


def images(count: int = 4, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def quantized_timm(name="test_resnet", **kwargs):
    model = small_timm(name)
    hf_daq.apply_daq(model, **(kwargs or {"bits": 3}))
    with hf_daq.calibrate(model):
        model(images(2, model.pretrained_cfg["input_size"][-1]))
    return model


class Masked(nn.Module):
    """Another random mask in each forward, as in the pretraining of ViT-MAE."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.second(x * (torch.rand(x.shape, device=x.device) < 0.5)).relu()
        return self.third(x * (torch.rand(x.shape, device=x.device) < 0.5))


def masked_error(model: nn.Module, exact: nn.Module, batches: list[Tensor]) -> float:
    """The squared error of outputs with the same masks."""
    total = 0.0
    for seed, batch in enumerate(batches):
        outputs = []
        for each in (model, exact):
            torch.manual_seed(seed)
            outputs.append(each(batch).detach())
        total += (outputs[0] - outputs[1]).square().sum().item()
    return total
