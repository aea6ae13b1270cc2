"""Trains a head to say what the backbone says (section 3.2.2 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from early_exit.handler.head import Head, HeadSpec


@dataclass(frozen=True)
class Distillation:
    """How heads are trained."""

    epochs: int = 40
    max_steps: int = 8000
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    dropout: float = 0.5
    seed: int = 0

    def n_steps(self, n_records: int) -> int:
        """Return the number of updates for N records."""
        return max(1, min(self.max_steps, self.epochs * -(-n_records // self.batch_size)))


def train_head(spec: HeadSpec, shape: tuple[int, ...], pooled: Tensor, teacher: Tensor, recipe: Distillation,
               on_step: Callable[[], None] = lambda: None) -> Head:
    """Minimise KL(backbone || head) over the train part.

    Args:
        spec: the head's architecture.
        shape: one row of the layer's activation, before pooling.
        pooled: (N, ...) recorded activations, pooled to the side of the spec.
        teacher: (N, K) log-probabilities of the backbone.
        recipe: how to train.
        on_step: called after every update.

    Returns:
        The head in evaluation mode. Its inputs were standardised for the training; that is folded into its
        first layer, so that it reads activations as they are.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = Head(spec, shape, teacher.shape[1])
        inputs = pooled.flatten(1)  # (N, D)
        mean, scale = inputs.mean(dim=0), inputs.std(dim=0, correction=0) + 1e-3
        inputs = (inputs - mean) / scale
        target = teacher.exp()
        n_steps = recipe.n_steps(len(inputs))
        optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=n_steps + 1)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(n_steps):
            if not len(order):
                order = torch.randperm(len(inputs), generator=generator)
            batch, order = order[:recipe.batch_size], order[recipe.batch_size:]
            logits = _forward_with_dropout(head, inputs[batch], recipe.dropout)
            loss = functional.kl_div(logits.log_softmax(dim=1), target[batch], reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            on_step()
    _fold_standardisation(head, mean, scale)
    return head.eval().requires_grad_(False)


def _forward_with_dropout(head: Head, x: Tensor, dropout: float) -> Tensor:
    for layer in head.layers:
        x = layer(functional.dropout(x, dropout) if isinstance(layer, nn.Linear) else x)
    return x


def _fold_standardisation(head: Head, mean: Tensor, scale: Tensor) -> None:
    first = next(layer for layer in head.layers if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight /= scale
        first.bias.sub_(first.weight @ mean)
