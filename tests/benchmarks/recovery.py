"""From a drift to a new certified plan, on a real server with its watcher.

    python -m tests.benchmarks.recovery --json FILE

A real TorchServe serves ResNet-18 (width 32) to CIFAR-10 requests, watched by the loop of `ee-watch`. The loop rolls in
a first plan. Then the traffic becomes blurred, and the worker's monitor raises an alarm and goes to a fallback level.
The loop makes a new plan from the records since then, rolls it in, and accepts it. No request is sent twice. Each run
has its own order of requests. A run that does not end with an accepted plan is reported with the reason and with what
was measured until then.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from early_exit.archiver.audit import Audit
from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.watch.triggers import Terms
from early_exit.archiver.watch.watched import Watched
from early_exit.archiver.watch.watcher import Watcher
from early_exit.training.options import TrainingOptions
from tests.benchmarks.report import report
from tests.support.cifar import as_batch, load_requests, load_weights
from tests.support.client import Reply, failed, send
from tests.support.corrupt import corrupted
from tests.support.original import original_mar
from tests.support.served import served_model

CONFIG = ("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 5\n"
          "early_exit:\n  seal_after_s: 2\n  sampling_rate: 1.0\n")
OPTIONS = TrainingOptions(measure="flops", search=None)
BLUR = 3.0
"""The radius of the blur in pixels."""
_CHUNK = 100
"""The number of requests between two looks at the monitor."""


@dataclass(frozen=True)
class Sizes:
    """How many requests each part of a run sends."""

    first: int
    """The number of requests for the first plan."""
    clean: int
    """The number of clean requests while the first plan is on trial."""
    drifted: int
    """The number of requests after the drift, until a new plan is made."""


SIZES = Sizes(3500, 500, 4000)


@dataclass(frozen=True)
class Served:
    """Some requests, and how they were answered."""

    replies: list[Reply]
    expected: list[str]
    """The classes that the backbone predicts."""
    step: int
    """The monitor's fallback level before the requests were sent."""


def main() -> int:
    parser = argparse.ArgumentParser(description="From a drift to a new certified plan.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--runs", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--requests", type=int, nargs=3, default=astuple(SIZES), metavar="N",
                        help="for the first plan, to watch it, and after the drift (%(default)s)")
    options = parser.parse_args()
    sizes = Sizes(*options.requests)
    return report(options.json, lambda scratch: recovered(scratch, options.runs, sizes),
                  {**vars(options), "server": CONFIG, "blur": BLUR, "tolerance": OPTIONS.tolerance})


def recovered(folder: Path, n_runs: int = 1, sizes: Sizes = SIZES) -> dict[str, Any]:
    """Go through the drift `n_runs` times; return what happened each time, and how many runs recovered."""
    told = []
    for seed in range(n_runs):
        story: dict[str, Any] = {"seed": seed, "recovered": False}
        try:
            live_through(folder / str(seed), seed, sizes, story)
            story["recovered"] = True
        except Exception as error:  # whatever went wrong, the other runs and what was measured are reported
            story["failure"] = f"{type(error).__name__}: {error}"
        told.append(story)
        print(story, flush=True)
    return {"traffic": f"blur of {BLUR} pixels", "tolerance": OPTIONS.tolerance, "sampling_rate": 1.0, "runs": n_runs,
            "recovered": sum(one["recovered"] for one in told), "each": told}


def live_through(folder: Path, seed: int, sizes: Sizes, story: dict[str, Any]) -> None:
    """Go through the drift once, and report how many answers differed, and how long the recovery took.

    Args:
        folder: the folder for everything that is made.
        seed: the seed for the order of the requests.
        sizes: how many requests each part sends; the remaining requests measure the new plan.
        story: gets every figure as soon as it is known.

    Raises:
        RuntimeError: the watcher did not decide as expected, or no alarm came.
    """
    bodies = load_requests()[0]
    random.Random(seed).shuffle(bodies)
    clean = bodies[:sizes.first + sizes.clean]
    drifted = [corrupted(body, "blur", BLUR) for body in bodies[len(clean):]]
    original = original_mar(folder / "original", "cifar", "cifar_resnet18w32.py", "cifar_handler.py",
                            load_weights("resnet18w32-cifar10-jpeg"), CONFIG)
    store = folder / "store"
    recorder = build_archive(ArchiveRequest(str(original), store, input_shape=(3, 32, 32)))
    backbone = served_model(recorder)
    with torch.no_grad():
        expected = [str(label) for batch in as_batch([*clean, *drifted]).split(250)
                    for label in backbone(batch).argmax(dim=1).tolist()]
    server = TorchServe(store, folder / "state", Addresses.free(), records=folder / "records", models=[recorder.name])
    with server:
        management = Management(server.addresses, server.key_file, server.secret_file)
        watched = Watched("cifar", [management], store, [str(folder / "records")],
                          folder / "watch", lambda archive: OPTIONS, None, Terms(OPTIONS.tolerance, 0.05, 1e9),
                          trial_samples=200, longest_batch_s=1.0)
        watcher = Watcher(watched, print)
        served = Requests(server, watcher, [*clean, *drifted], expected)
        sent = list(served.take(sizes.first))
        story["failed"] = failed_in(sent)
        tick(watcher, watched.audit, "rolled")
        before = list(served.take(sizes.clean))
        story["disagreement_before"], story["failed"] = disagreement(before), failed_in(sent := [*sent, *before])
        tick(watcher, watched.audit, "accepted")
        began = time.monotonic()
        during = []
        for chunk in served.take(sizes.drifted):
            during.append(chunk)
            if "requests_to_alarm" not in story and served.step:
                story |= {"requests_to_alarm": _CHUNK * len(during), "seconds_to_alarm": time.monotonic() - began}
        sent_s = time.monotonic() - began
        steps = sorted({chunk.step for chunk in during})
        story |= {"disagreement_by_step": {step: disagreement([one for one in during if one.step == step])
                                           for step in steps},
                  "seconds_of_drifted_traffic": sent_s, "failed": failed_in(sent := [*sent, *during])}
        if "requests_to_alarm" not in story:
            raise RuntimeError(f"no alarm came in {sizes.drifted} requests")
        tick(watcher, watched.audit, "rolled")
        story["seconds_to_new_plan"] = time.monotonic() - began - sent_s
        after = list(served.take(len(drifted) - sizes.drifted))
        story |= {"disagreement_after": disagreement(after), "left_early_after": share_of_early(after),
                  "failed": failed_in([*sent, *after])}
        tick(watcher, watched.audit, "accepted")
        plan = watcher.look().plan
        if plan is None or plan.certificate is None:
            raise RuntimeError("the version that serves has no certified plan")
        story |= {"new_plan": {"exits": len(plan.exits), "cost": plan.expected_cost, "n": plan.certificate.n,
                               "k": plan.certificate.k},
                  "decisions": [event["event"] for event in watched.audit.read()]}


class Requests:
    """A sender that sends every request once, in order."""

    def __init__(self, server: TorchServe, watcher: Watcher, bodies: Sequence[bytes], expected: Sequence[str]) -> None:
        self._server, self._watcher = server, watcher
        self._bodies, self._expected, self._sent = bodies, expected, 0

    @property
    def step(self) -> int:
        """The fallback level at which the monitor of the served version is."""
        return max((state.step for state in self._watcher.look().monitors), default=0)

    def take(self, n: int) -> Iterator[Served]:
        """Send the next requests, then wait until their records are on disk."""
        end = self._sent + n
        while self._sent < end:
            step, part = self.step, slice(self._sent, min(end, self._sent + _CHUNK))
            self._sent = part.stop
            yield Served(send(self._server, "cifar", self._bodies[part]), list(self._expected[part]), step)
        time.sleep(5)


def tick(watcher: Watcher, audit: Audit, decision: str) -> None:
    """Let the watcher run one round.

    Raises:
        RuntimeError: the watcher did not decide as expected.
    """
    watcher.tick()
    noted = audit.read()
    if not noted or noted[-1]["event"] != decision:
        raise RuntimeError(f"expected the watcher to note {decision!r}, found {noted[-1] if noted else 'nothing'}")


def disagreement(served: Sequence[Served]) -> float:
    """Return the share of the answers that differ from the backbone's.

    Raises:
        RuntimeError: no request was answered.
    """
    pairs = [(reply.top(), label) for one in served for reply, label in zip(one.replies, one.expected) if reply.ok]
    if not pairs:
        raise RuntimeError(f"none of {sum(len(one.replies) for one in served)} requests was answered")
    return sum(top != label for top, label in pairs) / len(pairs)


def failed_in(served: Sequence[Served]) -> int:
    return sum(failed(one.replies) for one in served)


def share_of_early(served: Sequence[Served]) -> float:
    replies = [reply for one in served for reply in one.replies if reply.ok]
    return sum(reply.exit != "full" for reply in replies) / len(replies)


if __name__ == "__main__":
    sys.exit(main())
