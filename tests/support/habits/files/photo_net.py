"""A classifier of photos of 224 x 224 pixels in five classes."""

from torch import Tensor, nn


class PhotoNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 8, 8, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Sequential(nn.Linear(128, 256), nn.ReLU())
        self.widened = nn.Sequential(nn.Linear(256, 512), nn.ReLU())
        self.classifier = nn.Linear(512, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(self.features(image)).flatten(1)
        return self.classifier(self.widened(self.hidden(x)))
