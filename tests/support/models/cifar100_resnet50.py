"""A ResNet-50 with a 3x3 stem and without max-pooling, as the weights `resnet50-cifar100` require."""

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet


class Cifar100ResNet50(ResNet):
    """A network of 3, 4, 6 and 3 bottlenecks for 3x32x32 images of a hundred classes."""

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=100)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()  # type: ignore[assignment]
