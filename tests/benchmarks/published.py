"""What the paper reports about its networks: FLOPs from its Table 3, CPU times at batches of 32 from its Table 5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BATCH = 32


@dataclass(frozen=True)
class Published:
    """A network of the paper; fractions lie in [0, 1]."""

    model: str
    data: str
    accuracy: float
    """The accuracy of the backbone, from Table 2."""
    accuracy_loss: float
    """The loss in accuracy, from Table 3."""
    flops: tuple[float, float]
    """The FLOPs without and with exits, in millions."""
    cpu_ms: tuple[float, float]
    """The CPU time without and with exits, in milliseconds."""
    cpu_saved: float
    """The share of CPU time saved that Table 5 states. For some networks, it contradicts the milliseconds there."""

    def to_json(self) -> dict[str, Any]:
        before, after = self.flops
        before_ms, after_ms = self.cpu_ms
        return {"backbone": self.model, "data": self.data, "accuracy_before": self.accuracy,
                "accuracy_loss": self.accuracy_loss, "flops_ratio": round(after / before, 3),
                "cpu_time_ratio": {str(BATCH): round(1 - self.cpu_saved, 3)},
                "cpu_time_ratio_by_its_ms": {str(BATCH): round(after_ms / before_ms, 3)}}


PUBLISHED = {
    "ResNet-18": Published("ResNet-18", "CIFAR-10", 0.8871, 0.0251, (765, 414), (13.4, 10.11), 0.2455),
    "ResNet-50": Published("ResNet-50", "CIFAR-100", 0.7898, 0.0246, (1304, 547), (19.59, 9.02), 0.4608),
    "MobileFaceNet": Published("MobileFaceNet", "LFW", 0.9778, 0.0091, (474, 296), (25.34, 16.91), 0.3323),
    "EfficientNet-Lite0": Published("EfficientNet", "LFW", 0.9729, 0.0199, (272, 182), (39.41, 27.98), 0.2901),
    "Mask R-CNN (ResNet-18)": Published("Mask R-CNN (ResNet-50)", "CityScape", 0.91, 0.0861, (4950, 2730),
                                        (895, 562.3), 0.4512),
    "DLRM": Published("DLRM", "Criteo", 0.7888, 0.0652, (153, 99), (9.0, 7.67), 0.147),
}
"""The paper's networks. Keys are the names of the subjects that represent them."""
