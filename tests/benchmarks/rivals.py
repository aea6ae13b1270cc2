"""Pairs of simultaneous rolls of one model, as from two hosts, on a real TorchServe with delayed management calls."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import RollReport, roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.api import ApiRequest
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.errors import EarlyExitError
from tests.support.digits import train_backbone
from tests.support.original import original_mar
from tests.support.rewritten import renumbered

MODEL = "digits"
CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 4\nmaxBatchDelay: 5\n"
MOST_S = (0.02, 0.4)
"""The longest delay before a call is sent, and after its answer. Each pair of rolls has one of these."""
BEGIN_S = (0.0, 1.5)
"""The two rolls of a pair begin within one of these times."""
STAYS_S = 3.0
"""The default version is checked again this long after a pair is done."""


class Delayed(Management):
    """The management client of another host, with a slow connection to the server."""

    def __init__(self, server: TorchServe, seed: str, most_s: float) -> None:
        super().__init__(server.addresses, server.key_file, server.secret_file)
        self._draw, self._most_s = random.Random(seed), most_s

    def _send(self, request: ApiRequest, limit_s: float) -> httpx.Response:
        time.sleep(self._draw.uniform(0, self._most_s))
        response = super()._send(request, limit_s)
        time.sleep(self._draw.uniform(0, self._most_s))
        return response


def rivals(folder: Path, n_pairs: int, seed: int) -> dict[str, Any]:
    """Return how many pairs were tried, and how many of them had not exactly one success that stays the default."""
    store = folder / "store"
    original = original_mar(folder / "original", MODEL, "digits_resnet.py", "digits_handler.py",
                            train_backbone(n_steps=100).state_dict(), CONFIG)
    first = build_archive(ArchiveRequest(str(original), store, input_shape=(1, 32, 32)))
    mars = {"2.0": first} | {version: renumbered(first, store / f"{MODEL}-{version}.mar", "2.0", version)
                             for version in ("3.0", "4.0")}
    pairs = []
    with TorchServe(store, folder / "state", Addresses.free(), records=folder / "records") as server:
        management = Management(server.addresses, server.key_file, server.secret_file)
        for number in range(n_pairs):
            is_first, are_equal = number % 2 == 0, number % 4 >= 2
            prepare(management, is_first, first)
            served = {status.version for status in management.versions(MODEL)}
            one, other = sorted(set(mars) - served)[:2]
            pair = at_once(server, mars, (one, one if are_equal else other), f"{seed}-{number}")
            pairs.append({"first": is_first, "equal": are_equal, **pair, "wrong": is_wrong(management, pair)})
    return {"rivals": len(pairs), "rivals_wrong": sum(pair["wrong"] for pair in pairs), "pairs": pairs}


def prepare(management: Management, is_first: bool, mar: Path) -> None:
    """Unregister all versions if `is_first`; otherwise make sure that a version is registered."""
    versions = management.versions(MODEL)
    for status in sorted(versions, key=lambda status: status.is_default) if is_first else ():
        management.unregister(MODEL, status.version)
    if not is_first and not versions:
        management.register(mar.name, RunSettings(workers=(1, 1)))


def at_once(server: TorchServe, mars: dict[str, Path], versions: tuple[str, str], seed: str) -> dict[str, Any]:
    """Roll two versions at once; return the outcome."""
    outcomes: list[RollReport | EarlyExitError | None] = [None, None]
    draw = random.Random(seed)
    most_s, within_s = draw.choice(MOST_S), draw.choice(BEGIN_S)
    begins_s = [draw.uniform(0, within_s) for _ in versions]

    def run(number: int) -> None:
        time.sleep(begins_s[number])
        try:
            outcomes[number] = roll(Delayed(server, f"{seed}-{number}", most_s), mars[versions[number]], untried=True,
                                    longest_batch_s=0.5)
        except EarlyExitError as error:
            outcomes[number] = error

    began = time.monotonic()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"versions": versions, "most_delay_s": most_s, "begin_within_s": within_s,
            "seconds": round(time.monotonic() - began, 1),
            "succeeded": [outcome.version for outcome in outcomes if isinstance(outcome, RollReport)],
            "said": [str(outcome) for outcome in outcomes if not isinstance(outcome, RollReport)]}


def is_wrong(management: Management, pair: dict[str, Any]) -> bool:
    """Tell whether a pair is wrong: only one success that is, and stays, the only version is right."""
    found = []
    for wait_s in (0.0, STAYS_S):
        time.sleep(wait_s)
        found.append([(status.version, status.is_default) for status in management.versions(MODEL)])
    return found != [[(version, True) for version in pair["succeeded"]]] * 2 or len(pair["succeeded"]) != 1
