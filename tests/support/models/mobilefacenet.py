"""MobileFaceNet with a classifier of identities, which is a linear layer on the direction of a face's embedding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class ConvBlock(nn.Module):
    """A convolution, a batch norm, and a PReLU unless the block is linear."""

    def __init__(self, channels_in: int, channels: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int = 0, groups: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.prelu = nn.Identity() if linear else nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """An inverted residual block: a wide depthwise convolution between two pointwise ones."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.connects = stride == 1 and channels_in == channels
        self.conv = nn.Sequential(
            nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.PReLU(wide),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.PReLU(wide),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.connects else self.conv(x)


class MobileFaceNet(nn.Module):
    """A model that maps (B, 3, 112, 96) faces in [-1, 1] to (B, 40) logits."""

    def __init__(self, n_identities: int = 40) -> None:
        super().__init__()
        self.conv1 = ConvBlock(3, 64, 3, 2, 1)
        self.dw_conv1 = ConvBlock(64, 64, 3, 1, 1, groups=64)
        blocks, channels = [], 64
        for expansion, width, count, stride in ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2),
                                                (2, 128, 2, 1)):
            for number in range(count):
                blocks.append(Bottleneck(channels, width, stride if number == 0 else 1, expansion))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = ConvBlock(128, 512, 1)
        self.linear7 = ConvBlock(512, 512, (7, 6), groups=512, linear=True)
        self.linear1 = ConvBlock(512, 128, 1, linear=True)
        self.identities = nn.Linear(128, n_identities)

    def embed(self, faces: Tensor) -> Tensor:
        """Return the (B, 128) directions of the embeddings."""
        x = self.conv2(self.blocks(self.dw_conv1(self.conv1(faces))))
        return functional.normalize(self.linear1(self.linear7(x)).flatten(1))

    def forward(self, faces: Tensor) -> Tensor:
        return self.identities(self.embed(faces))
