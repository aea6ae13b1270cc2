"""What exits cost, in FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from early_exit.handler.head import Head


def head_flops(head: Head, shape: tuple[int, ...]) -> int:
    """Return the FLOPs of a head for one row of a pooled activation; the pooling itself is not counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head.classify(torch.zeros(1, *shape))
    return int(counter.get_total_flops())
