"""A ResNet-18 of full width with a 3x3 stem and without max-pooling, as the weights `resnet18-cifar10-jpeg` require."""

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class CifarResNet18(ResNet):
    """Four groups of two basic blocks with 64, 128, 256 and 512 channels, for 3x32x32 images of ten classes."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=10)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()  # type: ignore[assignment]
