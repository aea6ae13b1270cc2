"""A small transformer for texts. It takes token numbers and a mask of valid ones, and returns a dict with logits."""

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, WIDTH = 128, 16, 32


class TextClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, norm_first=True)
                                     for _ in range(6)])
        self.classifier = nn.Linear(WIDTH, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.tokens(input_ids) + self.positions
        padding = torch.zeros(attention_mask.shape, dtype=x.dtype).masked_fill(attention_mask == 0, -1e4)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        counted = attention_mask[:, :, None].to(x.dtype)
        return {"logits": self.classifier((x * counted).sum(dim=1) / counted.sum(dim=1))}
