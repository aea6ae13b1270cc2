"""A model with one trunk and two classifiers, of a colour and of a size."""

from rows_net import RowsNet
from torch import Tensor, nn


class TwoHeadsNet(RowsNet):
    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.second(self.first(x))
        return {"colour": self.last(hidden), "size": self.size(hidden)}
