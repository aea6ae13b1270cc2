"""A model and its handler, which do not import TorchServe's packages. Requests are JSON lists of numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def rows_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


class RowsOfJson:
    """A handler that loads its model itself."""

    def initialize(self, context: Any) -> None:
        self.model = rows_model()
        weights = Path(context.system_properties["model_dir"], "weights.pth")
        if weights.exists():  # with a factory, the weights are in the exported model only
            self.model.load_state_dict(torch.load(weights, weights_only=True))
        context.batch_size_seen = context.system_properties["batch_size"]

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        batch = torch.tensor([json.loads(item["body"]) for item in data])
        with torch.no_grad():
            classes = self.model(batch).argmax(dim=1).tolist()
        for item in range(len(data)):
            context.set_response_header(item, "X-Own", context.get_request_id(item))
        context.metrics.add_counter("Rows", len(data))
        return [{"class": number} for number in classes]
