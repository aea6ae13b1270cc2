"""A small vision transformer for grey 32x32 digits, made from torchvision's."""

from torch import Tensor, nn
from torchvision.models import VisionTransformer


class SmallViT(nn.Module):
    """A transformer with patches of 4 x 4 pixels and 8 blocks of width 96."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = VisionTransformer(32, 4, num_layers=8, num_heads=4, hidden_dim=96, mlp_dim=192,
                                             num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.transformer(images.expand(-1, 3, -1, -1))
        return scores
