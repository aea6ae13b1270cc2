"""A head as it serves: it computes what the trained one does, divided by its temperature, in fewer operations.

On few rows the number of operations is what a head costs. The temperature is in the weights of the last layer, and
where feature maps are flattened, the next layer's weights are in the order in which channels_last maps lie in memory.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from early_exit.handler.engines.compiled_stage import Read, read_and_pool, read_as_it_is
from early_exit.handler.exits.head import Head

_LONG, _PARTS = 1024, 16
"""Inputs of a layer whose sums are cut on a GPU, and into how many."""


class InferenceHead(nn.Module):
    """Maps a (B, ...) activation, as the engine hands it on, to (B, K) calibrated logits."""

    def __init__(self, head: Head, temperature: float, read: Read = read_as_it_is) -> None:
        """Prepare a trained head.

        Args:
            head: trained.
            temperature: logits are divided by it.
            read: of what the engine hands on.
        """
        super().__init__()
        self._read = read
        layers = list(head.layers)
        flatten = next(index for index, layer in enumerate(layers) if isinstance(layer, nn.Flatten))
        self._pool = head.pool
        # A copy: moving what serves to its device must leave the trained head where it is.
        self._convolutions = deepcopy(nn.Sequential(*layers[:flatten])) if flatten else None
        linears = [layer for layer in layers[flatten:] if isinstance(layer, nn.Linear)]
        weights = [layer.weight.detach() for layer in linears]
        biases = [layer.bias.detach() for layer in linears]
        if len(head.flattened) == 3:
            first = weights[0].view(-1, *head.flattened).permute(0, 2, 3, 1)
            weights[0] = first.reshape(len(first), -1)
        weights[-1], biases[-1] = weights[-1] / temperature, biases[-1] / temperature
        self._weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)
        self._biases = nn.ParameterList(nn.Parameter(bias, requires_grad=False) for bias in biases)

    def forward(self, activation: Tensor) -> Tensor:
        x = read_and_pool(activation, self._read, self._pool)
        if self._convolutions is not None:
            x = self._convolutions(x)
        x = (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).flatten(1)
        last = len(self._weights) - 1
        for number, (weight, bias) in enumerate(zip(self._weights, self._biases)):
            x = _linear(x, weight, bias)
            if number < last:
                x = torch.relu_(x)
        return x


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return what `functional.linear` does.

    A few rows and a few outputs keep few of a GPU's processors busy, each with long sums; parts of them keep more.
    """
    if not x.is_cuda or x.shape[1] < _LONG or x.shape[1] % _PARTS:
        return functional.linear(x, weight, bias)
    rows, columns = (torch.unflatten(matrix, 1, (_PARTS, -1)) for matrix in (x, weight))
    return torch.bmm(rows.transpose(0, 1), columns.permute(1, 2, 0)).sum(dim=0).add_(bias)
