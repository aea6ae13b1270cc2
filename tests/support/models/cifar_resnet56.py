"""The ResNet-56 of He et al. 2015, section 4.2, as the weights `resnet56-cifar10-jpeg` require."""

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock


class ResNet56(nn.Module):
    """Three groups of nine basic blocks with 16, 32 and 64 channels, and with shortcuts without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._group(16, 16, 1)
        self.layer2 = self._group(16, 32, 2)
        self.layer3 = self._group(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def _group(self, channels_in: int, channels: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1:
            # The shortcut takes every second pixel, and zeros for the new channels (option A of the paper).
            new = (channels - channels_in) // 2
            shortcut = nn.Sequential(nn.AvgPool2d(1, stride), nn.ConstantPad3d((0, 0, 0, 0, new, new), 0.0))
        return nn.Sequential(BasicBlock(channels_in, channels, stride, shortcut),
                             *(BasicBlock(channels, channels) for _ in range(8)))

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores
