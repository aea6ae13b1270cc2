"""Rolls and rollbacks under load: no request fails or is lost, and the latency stays near that of quiet times.

    python -m tests.benchmarks.roll --json FILE

Eight closed-loop clients send digits all the time while versions with exits are rolled in and some are rolled back,
once with plain batching and once with early answers. Then pairs of rolls begin at once, a user's own server adopts
exits and is put back, and an operator switches the exits off, under load and after a minute without requests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.config import ANSWERS
from early_exit.training.command import raise_on_terminate
from tests.benchmarks.adoption import adoption
from tests.benchmarks.report import conditions, legible, save
from tests.benchmarks.rivals import rivals
from tests.benchmarks.switching import exits_off_s
from tests.support.client import BackgroundLoad, Reply, failed, latency_ms
from tests.support.digits import traffic, train_backbone
from tests.support.original import original_mar
from tests.support.plans import write_plan
from tests.support.rewritten import renumbered
from tests.support.workers import wait_until_ready

CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 5\nearly_exit:\n  answers: {answers}\n"
CLIENTS, PAUSE_S = 8, 0.0
WARM_UP_S, QUIET_S = 5.0, 20.0
MODEL = "digits"


def main() -> int:
    parser = argparse.ArgumentParser(description="Rolls and rollbacks under load.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rolls", type=int, default=20)
    parser.add_argument("--rollbacks", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20_000, help="at least so many in each mode")
    parser.add_argument("--answers", nargs="*", choices=ANSWERS, default=ANSWERS)
    parser.add_argument("--rivals", type=int, default=24, help="pairs of rolls at once")
    parser.add_argument("--seed", type=int, default=0, help="of the delays in these pairs")
    options = parser.parse_args()
    raise_on_terminate()
    run = conditions(vars(options))
    modes: dict[str, dict[str, Any]] = {}
    figures: dict[str, Any] = {}
    for part in (*options.answers, "adoption", "rivals", "switch"):
        with tempfile.TemporaryDirectory() as scratch:
            if part == "adoption":
                figures |= adoption(Path(scratch))
            elif part == "rivals":
                figures |= rivals(Path(scratch), options.rivals, options.seed)
            elif part == "switch":
                figures |= switched_off(Path(scratch))
            else:
                modes[part] = measure(Path(scratch), part, options.rolls, options.rollbacks, options.requests)
                figures = {key: combine(mode[key] for mode in modes.values())
                           for key, combine in (("requests", sum), ("failed", sum), ("lost", sum), ("p99_ratio", max),
                                                ("max_ms", max))} | {"modes": modes}
        save(options.json, run, figures)
    print(legible(figures))
    return 0


def measure(folder: Path, answers: str, n_rolls: int, n_rollbacks: int, n_requests: int) -> dict[str, Any]:
    """Roll through the versions under load, and return the figures of an answer mode."""
    store = folder / "store"
    first = with_exits(folder, store, answers)
    versions = [first, *(renumbered(first, first.with_name(f"{MODEL}-{number}.0.mar"), "3.0", f"{number}.0")
                         for number in range(4, n_rolls + 4))]
    bodies = [one.body for one in traffic(200, seed=31)]
    with TorchServe(store, folder / "state", Addresses.free(), records=folder / "records",
                    models=[first.name]) as server:
        management = Management(server.addresses, server.key_file, server.secret_file)
        with BackgroundLoad(server, MODEL, bodies, clients=CLIENTS, pause_s=PAUSE_S) as warm_up:
            time.sleep(WARM_UP_S)
        with BackgroundLoad(server, MODEL, bodies, clients=CLIENTS, pause_s=PAUSE_S) as load:
            time.sleep(QUIET_S)
            n_quiet = len(load.replies)
            every = -(-n_rolls // n_rollbacks) if n_rollbacks else n_rolls + 1
            ready_s = []
            for number, mar in enumerate(versions[1:], start=1):
                ready_s.append(roll(management, mar, longest_batch_s=1.0).ready_s)
                if number % every == 0:
                    roll(management, versions[number - 1], longest_batch_s=1.0)
                    roll(management, mar, longest_batch_s=1.0)
            rolled = len(load.replies)
            while len(load.replies) < n_requests:
                time.sleep(1)
        sent = len(load.replies)
    quiet, rolling = load.replies[:n_quiet], load.replies[n_quiet:rolled]
    return {
        "requests": sent, "failed": failed(load.replies), "lost": _lost([*warm_up.replies, *load.replies]),
        "p99_ratio": latency_ms(rolling, 0.99) / latency_ms(quiet, 0.99), "max_ms": latency_ms(rolling, 1.0),
        "p50_ms": {"quiet": latency_ms(quiet, 0.5), "rolling": latency_ms(rolling, 0.5)},
        "p99_ms": {"quiet": latency_ms(quiet, 0.99), "rolling": latency_ms(rolling, 0.99)},
        "max_quiet_ms": latency_ms(quiet, 1.0), "rolls": n_rolls, "rollbacks": n_rolls // every,
        "median_ready_s": sorted(ready_s)[len(ready_s) // 2], "versions_seen": len({one.version for one in rolling}),
    }


def switched_off(folder: Path) -> dict[str, float]:
    """Return for how many seconds exits still answer after the operator has switched them off."""
    store = folder / "store"
    first, bodies = with_exits(folder, store, "plain"), [one.body for one in traffic(200, seed=31)]
    with TorchServe(store, folder / "state", Addresses.free(), records=folder / "records",
                    models=[first.name]) as server:
        wait_until_ready(server, MODEL)
        return {"exits_off_s": exits_off_s(server, MODEL, bodies)}


def with_exits(folder: Path, store: Path, answers: str) -> Path:
    """Return an archive of a digits model with exits."""
    original = original_mar(folder / "original", MODEL, "digits_resnet.py", "digits_handler.py",
                            train_backbone(n_steps=100).state_dict(), CONFIG.format(answers=answers))
    recorder = build_archive(ArchiveRequest(str(original), store, input_shape=(1, 32, 32)))
    return build_archive(ArchiveRequest(str(recorder), store, plan=write_plan(folder / "run", recorder)))


def _lost(replies: list[Reply]) -> int:
    """Return how many requests got no answer at all."""
    return sum(reply.status == 0 for reply in replies)


if __name__ == "__main__":
    sys.exit(main())
