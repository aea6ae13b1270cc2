"""A small vision transformer. It is trained here on digits, since no pretrained one is available."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.support.digits import N_FOR_BACKBONE, batches, traffic
from tests.support.models.small_vit import SmallViT

N_TRAINED, N_RECORDED, N_MEASURED = 12_000, 3_000, 3_000
_BATCH = 64
_EPOCHS = 6


def trained() -> SmallViT:
    """Return a transformer trained on digits that traffic does not show. It takes about four minutes on one core."""
    torch.manual_seed(0)
    model = SmallViT()
    requests = traffic(N_TRAINED, seed=100, digits=range(N_FOR_BACKBONE))
    inputs = torch.cat(list(batches(requests, _BATCH)))
    labels = torch.tensor([one.label for one in requests])[:len(inputs)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    n_steps = _EPOCHS * (len(inputs) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=n_steps + 1)
    for _ in range(n_steps):
        rows = torch.randint(len(inputs), (_BATCH,))
        loss = functional.cross_entropy(model(inputs[rows]), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()
