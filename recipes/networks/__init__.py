"""Networks for small images, which an import registers with timm."""

from networks import cifar_mobilenet, cifar_resnet

__all__ = ["cifar_mobilenet", "cifar_resnet"]
