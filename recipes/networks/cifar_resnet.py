"""ResNet-20 for 32x32 images as the DAQ paper trains it, and a smaller sister, registered with timm.

    import networks.cifar_resnet
    model = timm.create_model("resnet20_cifar", num_classes=10)

The network of He et al. (2016, section 4.2) with three particulars: shortcuts hold no parameters (a strided slice, new
channels filled with zeros), the first convolution is followed by ReLU alone, and the pooled features pass a BatchNorm1d
before the classifier. A saved folder opens with timm.create_model("local-dir:...") once this file has been imported.
"""

from itertools import pairwise

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.new_channels = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet of 6 * depth + 2 layers: (N, in_chans, 32, 32) -> (N, num_classes). Any even image size works."""

    def __init__(self, depth: int = 3, width: int = 16, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 4 * width
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        widths = [width, width, 2 * width, 4 * width]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(CifarBlock(w_out if i else w_in, w_out, 2 if i == 0 and w_out > w_in else 1) for i in range(depth))
            )
            for w_in, w_out in pairwise(widths)
        )
        self.bn = nn.BatchNorm1d(self.num_features)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.bn(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def cfg(**overrides) -> dict:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **overrides,
    }


default_cfgs = generate_default_cfgs({"resnet20_cifar.untrained": cfg(), "resnet8_cifar.untrained": cfg()})


def _create(variant: str, pretrained: bool, **kwargs) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """0.27 M parameters, 41 M multiply-adds at 32x32."""
    return _create("resnet20_cifar", pretrained, depth=3, **kwargs)


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """0.08 M parameters, 12 M multiply-adds at 32x32."""
    return _create("resnet8_cifar", pretrained, depth=1, **kwargs)
