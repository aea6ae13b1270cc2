"""Trains a head to predict what the backbone predicts (section 3.2.2 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from early_exit.handler.exits.head import Head, HeadSpec

_STATISTICS_ROWS = 4096


class Rows(Protocol):
    """Activations of N records, in a tensor or in a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


Classify = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Distillation:
    """How heads are trained."""

    epochs: int = 40
    max_steps: int = 5000
    """The largest number of updates. If there are many records or replays, each is seen fewer than `epochs` times."""
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    dropout: float = 0.5
    seed: int = 0
    device: str = "cpu"

    def n_steps(self, n_records: int) -> int:
        """Return the number of updates for N records."""
        return max(1, min(self.max_steps, self.epochs * -(-n_records // self.batch_size)))


def train_head(spec: HeadSpec, shape: tuple[int, ...], recorded: Rows, teacher: Rows, recipe: Distillation,
               on_step: Callable[[int, Classify], bool] = lambda step, classify: True) -> Head:
    """Minimise KL(backbone || head) over the train part.

    Args:
        spec: the head's architecture.
        shape: the shape of one row of the layer's activation, before pooling.
        recorded: (N, ...) activations, as recorded.
        teacher: (N, K) log-probabilities of the backbone.
        recipe: how to train.
        on_step: called after every update with the number of updates made and the head so far as a function
            from (B, ...) pooled activations to (B, K) logits; training ends early when it returns false.

    Returns:
        The head in evaluation mode, on the CPU. Standardisation of its inputs and normalisation inside are folded
        into its layers, so that it reads activations as they are.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    n_classes = teacher[torch.tensor([0])].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = Head(spec, shape, n_classes)
        trainee = _Trainee(head, spec.reads(recorded[_sample(len(recorded))].float()), recipe.dropout, recipe.seed)
        trainee.to(recipe.device)
        n_steps = recipe.n_steps(len(recorded))
        optimizer = torch.optim.AdamW(trainee.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=n_steps + 1)
        order = torch.empty(0, dtype=torch.int64)
        for step in range(1, n_steps + 1):
            if len(order) < 2:  # normalisation needs two rows
                order = torch.randperm(len(recorded), generator=generator)
            batch, order = order[:recipe.batch_size], order[recipe.batch_size:]
            inputs, target = recorded[batch].to(recipe.device).float(), teacher[batch].to(recipe.device).float().exp()
            logits = trainee(spec.reads(inputs))
            loss = functional.kl_div(logits.log_softmax(dim=1), target, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if not on_step(step, trainee.classify):
                break
    return trainee.fold()


def _sample(n_records: int) -> Tensor:
    """Return the rows from which statistics are computed: all rows, or evenly spread ones."""
    return torch.linspace(0, n_records - 1, min(n_records, _STATISTICS_ROWS)).long()


class _Trainee(nn.Module):
    """A head in training: standardised inputs, normalised convolutions, and dropout before linear layers."""

    def __init__(self, head: Head, pooled: Tensor, dropout: float, seed: int) -> None:
        super().__init__()
        # With channels_last, training depthwise convolutions takes half the time.
        self.head = head.to(memory_format=torch.channels_last)
        self.dropout = dropout
        self._noise = np.random.Generator(np.random.SFC64(abs(seed)))
        # Zero padding must stay zero before a convolution, so its inputs are scaled but not shifted.
        self.shifts = not head.spec.convolutions
        dims = (0,) if self.shifts else (0, 2, 3)
        deviation = pooled.std(dim=dims, correction=0)
        # Records hold float16. A change that it rounds away is there in service, and would be taken for a large one, so
        # the head does not read inputs that are constant in their records, such as a large value or a dead channel.
        half = torch.finfo(torch.float16)
        resolution = half.eps * pooled.abs().amax(dim=dims).clamp(min=half.tiny)
        scale = torch.where(deviation > resolution, deviation + 1e-3, torch.inf)
        self.scale = nn.Buffer(scale if self.shifts else scale[:, None, None])
        self.mean = nn.Buffer(pooled.mean(dim=dims) if self.shifts else torch.zeros(()))
        self.norms = nn.ModuleDict({
            str(index): nn.BatchNorm2d(layer.out_channels)
            for index, layer in enumerate(head.layers)
            if isinstance(layer, nn.Conv2d) and isinstance(head.layers[index + 1], nn.ReLU)})

    def forward(self, pooled: Tensor) -> Tensor:
        x = (pooled - self.mean) / self.scale
        if self.norms:
            x = x.contiguous(memory_format=torch.channels_last)
        for index, layer in enumerate(self.head.layers):
            if isinstance(layer, nn.Linear) and self.training:
                x = self._drop(x)
            x = layer(x)
            if str(index) in self.norms:
                x = self.norms[str(index)](x)
        return x

    def _drop(self, x: Tensor) -> Tensor:
        """Return x with a share of its elements set to zero, and the others scaled up so that the mean stays."""
        if x.device.type != "cpu":
            return functional.dropout(x, self.dropout)
        # A byte of noise for each element: torch's own dropout takes half of the time of a linear head's step.
        noise = torch.frombuffer(bytearray(self._noise.bytes(x.numel())), dtype=torch.uint8).view(x.shape)
        dropped = round(256 * self.dropout)
        return x * (noise >= dropped) * (256 / (256 - dropped))

    def classify(self, pooled: Tensor) -> Tensor:
        """Return (B, K) logits in evaluation mode, to evaluate the head during training."""
        self.eval()
        with torch.no_grad():
            logits: Tensor = self(pooled.to(self.scale.device)).cpu()
        self.train()
        return logits

    def fold(self) -> Head:
        """Fold standardisation and normalisation into the head's own layers, and return the head."""
        head = self.cpu().head.to(memory_format=torch.contiguous_format)
        first = next(layer for layer in head.layers if isinstance(layer, (nn.Conv2d, nn.Linear)))
        with torch.no_grad():
            if isinstance(first, nn.Linear):
                first.weight /= self.scale.flatten()
                first.bias.sub_(first.weight @ self.mean.flatten())
            else:
                # A depthwise layer has one input channel for each output channel; other layers have all of them.
                scale = self.scale.view(-1, 1, 1, 1) if first.groups > 1 else self.scale.view(1, -1, 1, 1)
                first.weight /= scale
        for index, norm in self.norms.items():
            layer = head.layers[int(index)]
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                head.layers[int(index)] = fuse_conv_bn_eval(layer.eval(), norm.eval())
        return head.eval().requires_grad_(False)
