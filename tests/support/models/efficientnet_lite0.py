"""EfficientNet-Lite0 as the package `efficientnet-lite-pytorch` builds it."""

from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn


class EfficientNetLite0(nn.Module):
    """A model that maps (B, 3, 224, 224) photos to the scores of the 1,000 ImageNet classes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores
