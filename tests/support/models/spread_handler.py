"""A handler that can set the clock of its worker.

Requests are JSON lists of numbers. A request {"clock": seconds} sets the clock of its worker ahead by this time.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from spread_model import spread_model

_SCALE = 1.0
_time, _time_ns = time.time, time.time_ns


class SpreadHandler:
    """A handler that answers with the number of the class."""

    def initialize(self, context: Any) -> None:
        self.model = spread_model()

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        asked = [json.loads(item["body"]) for item in data]
        rows = [values for values in asked if isinstance(values, list)]
        for settings in asked:
            if isinstance(settings, dict):
                set_clock(settings["clock"])
        if not rows:
            return ["set"] * len(data)
        with torch.no_grad():
            classes = iter(self.model(_SCALE * torch.tensor(rows)).argmax(dim=1).tolist())
        return [next(classes) if isinstance(values, list) else "set" for values in asked]


def set_clock(ahead_s: float) -> None:
    time.time = lambda: _time() + ahead_s
    time.time_ns = lambda: _time_ns() + int(1e9 * ahead_s)
