"""A model that carries a configuration with the names of its classes."""

from types import SimpleNamespace

from rows_net import RowsNet


class ConfigNet(RowsNet):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(id2label={0: "low", 1: "middle", 2: "high"}, num_labels=3)
