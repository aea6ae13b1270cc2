"""A ResNet-18 of base width 32 with a 3x3 stem, as the weights `resnet18w32-cifar10-jpeg` require."""

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock


class ResNet18W32(nn.Module):
    """Four groups of two basic blocks with 32, 64, 128 and 256 channels, for 3x32x32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = self._group(32, 32, 1)
        self.layer2 = self._group(32, 64, 2)
        self.layer3 = self._group(64, 128, 2)
        self.layer4 = self._group(128, 256, 2)
        self.fc = nn.Linear(256, 10)

    def _group(self, channels_in: int, channels: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1:
            shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        return nn.Sequential(BasicBlock(channels_in, channels, stride, shortcut), BasicBlock(channels, channels))

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(x.mean(dim=(2, 3)))
        return scores
