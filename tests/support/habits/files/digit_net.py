"""A classifier of grey images of 28 pixels that answers with log-probabilities, like TorchServe's MNIST example."""

from torch import Tensor, nn


class DigitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.hidden = nn.Sequential(nn.Linear(392, 64), nn.ReLU())
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return self.classifier(self.hidden(x)).log_softmax(dim=1)
