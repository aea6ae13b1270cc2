"""When a renewal is tried again whose records could not be used, however many there were."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from unittest import mock

import torch

from early_exit.archiver.watch.cli import _status
from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.watcher import Watcher
from early_exit.handler.errors import RecordError
from early_exit.training.paths import RunPaths
from tests.archiver.test_renewal import START, WatcherOfSights, rolled, seen, watcher

__all__ = ["rolled", "watcher"]  # the fixtures


def cannot_use(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
    """Do what a training does whose records it cannot use, however many there are."""
    raise RecordError("no layer has a head that is better than chance")


def kept(first: int, n_records: int) -> ModelStatus:
    """Return a model of whose records retention has kept a number, from the second of the first one on."""
    return replace(seen(first + n_records, plan=None), times=START + first + torch.arange(n_records).double())


def test_records_that_cannot_be_used_are_followed_by_another_attempt_although_retention_keeps_their_number(
        watcher: WatcherOfSights) -> None:
    watcher.training.does = cannot_use
    for first in range(0, 1500, 7):
        watcher.sight = kept(first, 5000)
        watcher.tick()
        assert watcher.obstacle(watcher.sight) is None
    assert watcher.training.asked == [4999, 4999 + 994], "a look every 7 s"
    assert fresh_and_needed(watcher) == (5000, 5000 - 1498 % 994 + 994)


def fresh_and_needed(watcher: WatcherOfSights) -> tuple[int, int]:
    """Return the numbers of fresh and of needed records in the status."""
    with mock.patch.object(Watcher, "look", lambda self: watcher.sight):
        facts = json.loads(_status(watcher._watched, as_json=True))
    return facts["fresh records"], facts["needed"]


def test_records_of_a_clock_that_is_ahead_do_not_repeat_a_refused_attempt_at_each_look(
        watcher: WatcherOfSights) -> None:
    watcher.training.does = cannot_use
    ahead = time.time() + 10_000
    for n_later in (0, 500, 993, 994):
        times = torch.cat([ahead + torch.arange(3000).double(), START + 40_000 + torch.arange(3000).double(),
                           time.time() + torch.arange(n_later).double() / 1000]).sort().values
        watcher.sight = replace(seen(6000, plan=None), times=times)
        watcher.tick()
        assert len(watcher.training.asked) == 1 + (n_later == 994)
