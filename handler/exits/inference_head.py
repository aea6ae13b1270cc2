"""A head for serving: it computes the logits of the trained head, divided by its temperature, in fewer operations.

With few rows, the time that a head takes depends on the number of its operations. The temperature is therefore part of
the weights of the last layer. If feature maps are flattened, the weights of the next layer are in the order of
channels_last memory.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from early_exit.handler.engines.compiled_stage import Read, read_and_pool, without_autocast
from early_exit.handler.exits.head import Head

_LONG, _PARTS = 1024, 16
"""On a GPU, the sums of a layer with at least `_LONG` inputs are split into `_PARTS` parts."""


class InferenceHead(nn.Module):
    """Maps a (B, ...) activation, as the engine passes it on, to (B, K) calibrated logits."""

    def __init__(self, head: Head, temperature: float, read: Read = Tensor.float) -> None:
        """Prepare a trained head.

        Args:
            head: the trained head.
            temperature: logits are divided by it.
            read: converts what the engine passes on to the activation.
        """
        super().__init__()
        self._read = read
        layers = list(head.layers)
        flatten = next(index for index, layer in enumerate(layers) if isinstance(layer, nn.Flatten))
        self._pool = head.pool
        # A copy: moving this module to a device must not move the trained head.
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
        with without_autocast(activation.device):
            return self._logits(activation)

    def _logits(self, activation: Tensor) -> Tensor:
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
    """Compute `functional.linear`.

    With few rows and few outputs, only few processors of a GPU are busy, each with long sums. Splitting the sums keeps
    more of them busy.
    """
    if not x.is_cuda or x.shape[1] < _LONG or x.shape[1] % _PARTS:
        return functional.linear(x, weight, bias)
    rows, columns = (torch.unflatten(matrix, 1, (_PARTS, -1)) for matrix in (x, weight))
    return torch.bmm(rows.transpose(0, 1), columns.permute(1, 2, 0)).sum(dim=0).add_(bias)
