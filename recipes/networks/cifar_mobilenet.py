"""A small MobileNetV2 for 32x32 images, registered with timm: timm's `mobilenetv2_050` whose first convolution has the stride 1.

    import networks.cifar_mobilenet
    model = timm.create_model("mobilenetv2_050_cifar", num_classes=10)

A saved folder opens with timm.create_model("local-dir:...") once this file has been imported.
"""

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from networks.cifar_resnet import cfg

default_cfgs = generate_default_cfgs(
    {"mobilenetv2_050_cifar.untrained": cfg(pool_size=(2, 2), first_conv="conv_stem", classifier="classifier")}
)


def _create(**kwargs) -> timm.models.EfficientNet:
    model = timm.create_model("mobilenetv2_050", **kwargs)
    model.conv_stem.stride = (1, 1)
    return model


@register_model
def mobilenetv2_050_cifar(pretrained: bool = False, **kwargs) -> timm.models.EfficientNet:
    """0.7 M parameters, 8 M multiply-adds at 32x32; 17 depthwise convolutions."""
    return build_model_with_cfg(_create, "mobilenetv2_050_cifar", pretrained, **kwargs)
