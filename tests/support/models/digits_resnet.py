"""A small CIFAR-style ResNet for grey 32x32 digits: the model file of most archives in the tests."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class DigitsResNet(nn.Module):
    """A stem and three groups of two residual blocks with 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = self._group(16, 16, 1)
        self.layer2 = self._group(16, 32, 2)
        self.layer3 = self._group(32, 64, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def _group(self, channels_in: int, channels: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1:
            shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        return nn.Sequential(BasicBlock(channels_in, channels, stride, shortcut), BasicBlock(channels, channels))

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(images))))
        scores: Tensor = self.fc(self.pool(x).flatten(1))
        return scores
