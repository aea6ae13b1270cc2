"""DLRM: an MLP for the counts, embeddings of the categories, dot products of both, and an MLP on top."""

import torch
from torch import Tensor, nn

COUNTS, CATEGORIES, BUCKETS, WIDTH = 13, 26, 2000, 64


class Embeddings(nn.Module):
    """A layer that returns one vector for the counts and one for each category."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(COUNTS, 256), nn.ReLU(), nn.Linear(256, WIDTH), nn.ReLU())
        self.table = nn.Embedding(CATEGORIES * BUCKETS, WIDTH)
        self.register_buffer("offsets", BUCKETS * torch.arange(CATEGORIES))

    def forward(self, record: Tensor) -> Tensor:
        """Return (B, 27, WIDTH) for (B, 39) records."""
        categories = self.table(record[:, COUNTS:].long() + self.offsets)
        return torch.cat((self.bottom(record[:, :COUNTS])[:, None], categories), dim=1)


class Interaction(nn.Module):
    """A layer that returns the vector of the counts and the dot products of all pairs of vectors."""

    def __init__(self) -> None:
        super().__init__()
        first, second = torch.tril_indices(CATEGORIES + 1, CATEGORIES + 1, -1)
        self.register_buffer("pairs", first * (CATEGORIES + 1) + second)

    def forward(self, vectors: Tensor) -> Tensor:
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat((vectors[:, 0], products.index_select(1, self.pairs)), dim=1)


class DLRM(nn.Module):
    """A model that maps (B, 39) float32 records of 13 counts and 26 buckets to (B, 2) logits of no click and click."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.interaction = Interaction()
        self.top = nn.Sequential(nn.Linear(WIDTH + CATEGORIES * (CATEGORIES + 1) // 2, 1024), nn.ReLU(),
                                 nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(),
                                 nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 2))

    def forward(self, record: Tensor) -> Tensor:
        return self.top(self.interaction(self.embeddings(record)))
