"""The public package `earlyon` 0.3.0 in its documented steps: custom_ee, stage2_train_exits, calibrate_thresholds.

Its heads (global average pool, one hidden layer of 128), its training (Adam, labels, all heads together), its
temperatures and its greedy search for thresholds run unchanged. They are attached to a module of ours, which plays back
recorded activations as if the frozen backbone computed them, so the backbone runs once and not in every epoch. The
trained heads are converted into ours with the same weights, so they serve as fast as ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from early_exit.handler.backbone.pooling import Side
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import Exit
from tests.benchmarks.baselines.labelled import LabelledRecords
from tests.support.cifar import DataMissing

EPOCHS = 20
_BATCH = 128
_CHUNK = 1024


class _Part(nn.Module):
    """A module that plays back one layer: a range of the columns of a record."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, record: Tensor) -> Tensor:
        return record[:, self.start:self.end]


class Playback(nn.Module):
    """A module that plays back a backbone from (B, sum of widths) records: a part for each layer, then the scores."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        starts = [sum(widths[:index]) for index in range(len(widths))]
        self.parts = nn.ModuleList(_Part(start, start + width) for start, width in zip(starts, widths))

    def forward(self, record: Tensor) -> Tensor:
        for part in self.parts:
            value = part(record)
        scores: Tensor = value
        return scores


def as_head(trained: nn.Module, shape: tuple[int, ...], recorded: Side, n_classes: int) -> Head:
    """Return a head of ours that computes what a head of earlyon computes in eval mode from the means of activations.

    Args:
        trained: earlyon's head, with the layers linear, ReLU, dropout, linear.
        shape: the shape of one row of the activation.
        recorded: the side to which the recorded activations were pooled.
        n_classes: the number of classes, K.
    """
    first, *_, last = (layer for layer in trained.classifier if isinstance(layer, nn.Linear))
    head = Head(HeadSpec(1 if len(shape) == 3 else recorded, widths=(first.out_features,), recorded=recorded), shape,
                n_classes)
    ours = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    weight = first.weight.detach()
    if len(shape) == 2:  # our heads read the first token as well as the mean of all tokens
        weight = torch.cat([torch.zeros_like(weight), weight], dim=1)
    ours[0].load_state_dict({"weight": weight, "bias": first.bias})
    ours[1].load_state_dict(last.state_dict())
    return head.eval().requires_grad_(False)


def _means(recorded: Tensor) -> Tensor:
    """Return what earlyon's heads pool activations to: the mean of each channel, or of all tokens; vectors stay."""
    if recorded.dim() == 4:
        return recorded.mean(dim=(2, 3))
    return recorded[:, 1] if recorded.dim() == 3 else recorded


def earlyon(records: LabelledRecords, max_loss: float) -> dict[str, Exit]:
    """Return the exits that earlyon enables for an accuracy budget.

    Raises:
        DataMissing: the package is not installed.
    """
    package = _package()
    means = [torch.cat([_means(records.pooled[layer.path][rows].float()) for rows in torch.arange(
        len(records.labels)).split(_CHUNK)]) for layer in records.layers]
    scores = nn.functional.one_hot(records.backbone_class, records.n_classes).float()
    columns = torch.cat([*means, scores], dim=1)
    widths = [one.shape[1] for one in (*means, scores)]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        names = [f"parts.{index}" for index in range(len(means))]
        wrapper = package.custom_ee(Playback(widths), names, records.n_classes, input_shape=(1, columns.shape[1]))

        def loader(rows: Tensor, *, shuffle: bool = False) -> DataLoader[Any]:
            return DataLoader(TensorDataset(columns[rows], records.labels[rows]), _BATCH, shuffle=shuffle)

        package.stage2_train_exits(wrapper, loader(records.train, shuffle=True), epochs=EPOCHS,
                                   on_epoch_end=lambda log: None)
        package.calibrate_thresholds(wrapper, loader(records.tune[1::2]), target_accuracy_drop=max_loss,
                                     fit_temperature=True, temperature_loader=loader(records.tune[::2]))
    config = wrapper.config
    exits: dict[str, Exit] = {}
    for layer, point, threshold, enabled in zip(records.layers, config.exit_points, config.confidence_thresholds,
                                                config.enabled_exits):
        if enabled:
            head = as_head(wrapper.exit_heads[point.name], layer.shape, records.recorded, records.n_classes)
            temperature = config.temperatures[point.name]
            exits[layer.path] = Exit(head, ConfidencePolicy(temperature, threshold),
                                     partial(torch.div, other=temperature))
    return exits


def earlyon_thresholds(logits: Tensor, scores: Tensor, labels: Tensor,
                       max_loss: float) -> tuple[list[float], list[float]]:
    """Return the temperatures and thresholds that earlyon's rule gives to trained heads.

    Args:
        logits: the heads' logits, (N, L, K).
        scores: the backbone's scores, (N, K).
        labels: the true classes, (N,).
        max_loss: the accuracy budget.

    Returns:
        The temperature and the threshold of each head. The threshold of a disabled exit is above 1.
    """
    package = _package()
    n_layers, n_classes = logits.shape[1:]
    columns = torch.cat([logits.flatten(1), scores], dim=1)
    names = [f"parts.{index}" for index in range(n_layers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = package.custom_ee(Playback([n_classes] * (n_layers + 1)), names, n_classes,
                                    input_shape=(1, columns.shape[1]))
        for name in list(wrapper.exit_heads):
            wrapper.exit_heads[name] = nn.Identity()

        def loader(rows: slice) -> DataLoader[Any]:
            return DataLoader(TensorDataset(columns[rows], labels[rows]), 1024)

        package.calibrate_thresholds(wrapper, loader(slice(1, None, 2)), target_accuracy_drop=max_loss,
                                     fit_temperature=True, temperature_loader=loader(slice(0, None, 2)))
    config = wrapper.config
    thresholds = [threshold if enabled else 2.0
                  for threshold, enabled in zip(config.confidence_thresholds, config.enabled_exits)]
    return [config.temperatures[point.name] for point in config.exit_points], thresholds


class _Package:
    def __init__(self) -> None:
        from earlyon.core.thresholds import calibrate_thresholds
        from earlyon.models.custom import custom_ee
        from earlyon.training.two_stage_trainer import stage2_train_exits

        self.custom_ee, self.stage2_train_exits = custom_ee, stage2_train_exits
        self.calibrate_thresholds = calibrate_thresholds


def _package() -> _Package:
    try:
        return _Package()
    except ImportError as error:
        raise DataMissing(f"{error.name} is not installed: pip install '.[bench]'") from error
