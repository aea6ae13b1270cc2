"""Malformed requests among good ones, sent to a real TorchServe with early exits.

    python -m tests.benchmarks.fuzz --json FILE

Every bad request must get a 4xx status with a reason, and every good request its answer. No worker may die, and the
memory must not grow.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from early_exit.training.command import raise_on_terminate
from tests.benchmarks.report import report
from tests.support.client import send
from tests.support.digits import traffic, train_backbone
from tests.support.original import original_mar
from tests.support.plans import write_plan
from tests.support.workers import resident_mb

CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 5\nearly_exit:\n  control_rate: 0\n"
CLIENTS = 8
WARM_UP = 1000


@dataclass(frozen=True)
class Bad:
    """A request that no server should answer with 200."""

    kind: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def truncated(good: bytes, draw: random.Random) -> Bad:
    return Bad("truncated image", good[:draw.randrange(9, len(good) - 60)])


def flipped(good: bytes, draw: random.Random) -> Bad:
    """Damage the first bytes, by which decoders recognize a format."""
    return Bad("damaged image", draw.randbytes(8) + good[8:])


def huge(good: bytes, draw: random.Random) -> Bad:
    """Claim more pixels than any memory can hold."""
    side = draw.randrange(20_000, 2**31 - 1)
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return Bad("huge dimensions", good[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
               + good[33:])


def empty(good: bytes, draw: random.Random) -> Bad:
    return Bad("empty body", b"")


def other_type(good: bytes, draw: random.Random) -> Bad:
    return Bad("other type", draw.choice([b"PK\3\4" + draw.randbytes(50), b"%PDF-1.7\n", b"<html>", b"GIF89a",
                                          "x\u00e4\u00f6".encode() * 20, draw.randbytes(draw.randrange(1, 2000))]))


def wrong_header(good: bytes, draw: random.Random) -> Bad:
    kind, body = draw.choice([
        ("application/json", b'{"data": '), ("application/json", b"[[1, 2], [3]]"), ("application/json", b'"text"'),
        ("application/json", b"null"), ("text/plain", b"no image"), ("text/plain; charset=utf-8", b"\xff\xfe"),
        ("application/json", b'{"a": {"b": []}}')])
    return Bad("wrong header", body, {"Content-Type": kind})


KINDS: tuple[Callable[[bytes, random.Random], Bad], ...] = (truncated, flipped, huge, empty, other_type, wrong_header)


def main() -> int:
    parser = argparse.ArgumentParser(description="Malformed requests among good ones.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--bad", type=int, default=10_000)
    options = parser.parse_args()
    raise_on_terminate()
    return report(options.json, lambda scratch: fuzz(scratch, options.bad), vars(options))


def fuzz(folder: Path, n_bad: int) -> dict[str, Any]:
    """Serve digits with exits, send all requests, and return the figures."""
    original = original_mar(folder / "original", "digits", "digits_resnet.py", "digits_handler.py",
                            train_backbone(n_steps=100).state_dict(), CONFIG)
    recorder = build_archive(ArchiveRequest(str(original), folder / "store", input_shape=(1, 32, 32)))
    build_archive(ArchiveRequest(str(recorder), folder / "store", plan=write_plan(folder / "run", recorder)))
    bodies = [one.body for one in traffic(200, seed=30)]
    draw = random.Random(0)
    mixed: list[Bad | int] = [draw.choice(KINDS)(draw.choice(bodies), draw) for _ in range(n_bad)]
    mixed += [draw.randrange(len(bodies)) for _ in range(n_bad // 4)]
    draw.shuffle(mixed)
    with TorchServe(folder / "store", folder / "state", Addresses.free(), records=folder / "records",
                    models=["digits-3.0.mar"]) as server:
        expected = [reply.top() for reply in send(server, "digits", bodies)]
        before = {worker.pid for worker in server.workers()}
        wrong: Counter[str] = Counter()
        n_answered: Counter[str] = Counter()
        _all(server, mixed[:WARM_UP], bodies, expected, wrong, n_answered)
        started_mb = resident_mb(server)
        _all(server, mixed[WARM_UP:], bodies, expected, wrong, n_answered)
        grown_mb = resident_mb(server) - started_mb
        deaths = len(before - {worker.pid for worker in server.workers()})
    return {"sent": len(mixed), "wrong": wrong.total(), "worker_deaths": deaths, "rss_growth_mb": grown_mb,
            "bad": n_bad, "good": len(mixed) - n_bad, "wrong_by_kind": dict(wrong), "statuses": dict(n_answered)}


def _all(server: TorchServe, mixed: list[Bad | int], bodies: list[bytes], expected: list[str], wrong: Counter[str],
         n_answered: Counter[str]) -> None:
    """Send every bad request, and for each number the good request with that number."""
    numbers, lock = iter(range(len(mixed))), threading.Lock()

    def run() -> None:
        session = requests.Session()
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {read_token(server.key_file, 'inference')}"
        url = f"{server.addresses.inference}/predictions/digits"
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            one = mixed[number]
            kind = one.kind if isinstance(one, Bad) else "good"
            try:
                response = session.post(url, data=one.body if isinstance(one, Bad) else bodies[one],
                                        headers=one.headers if isinstance(one, Bad) else None, timeout=60)
                status, text = response.status_code, response.text
            except requests.RequestException as error:
                status, text = 0, repr(error)
            right = 400 <= status < 500 and "message" in text if isinstance(one, Bad) else \
                status == 200 and _top(text) == expected[one]
            with lock:
                n_answered[f"{kind}: {status}"] += 1
                if not right:
                    wrong[f"{kind}: {status} {text[:100]}"] += 1

    threads = [threading.Thread(target=run) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _top(text: str) -> str:
    scores = json.loads(text)
    return max(scores, key=lambda name: float(scores[name]))


if __name__ == "__main__":
    sys.exit(main())
