"""ResNet-50 with a 3x3 stem and without max-pool, as the weights `resnet50-cifar100` expect it."""

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet


class Cifar100ResNet50(ResNet):
    """Bottlenecks 3-4-6-3 for 3x32x32 images of a hundred classes."""

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=100)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()  # type: ignore[assignment]
