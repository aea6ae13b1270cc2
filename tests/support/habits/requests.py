"""Habits of requests: envelopes, kinds of bodies, threads, errors, gRPC and workflows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.support.habits.habit import Ask, Over
from tests.support.habits.rows import JSON, ROWS, asks, rows

NUMBERS = [[round(value, 4) for value in row] for row in ROWS.tolist()]
NO_ROW = Ask(b"no row", fails=True)
LARGE = Ask(json.dumps([1e4] * 6).encode(), fails=True, exact=True)


def instances(rows_of: Sequence[Sequence[int]], **more: Any) -> tuple[Ask, ...]:
    """Return requests, each of which holds some of the rows as instances."""
    return tuple(Ask(json.dumps({"instances": [NUMBERS[number] for number in numbers]}).encode(), JSON, **more)
                 for numbers in rows_of)


def tensors(numbers: Sequence[int]) -> Ask:
    """Return a request in KServe's second protocol for some of the rows."""
    inputs = [{"name": f"row-{number}", "shape": [6], "datatype": "FP32", "data": NUMBERS[number]}
              for number in numbers]
    return Ask(json.dumps({"id": "mine", "inputs": inputs}).encode(), JSON, fails=True)


def over(way: Over) -> tuple[Ask, ...]:
    """Return the usual requests, each over REST and in another way, and one request that fails."""
    return (*asks(), *(replace(ask, over=way, content_type="") for ask in asks()), replace(NO_ROW, over=way))


PARTS = tuple(Ask(parts=(("row", json.dumps(row).encode(), JSON), ("factor", b"0.5", "application/octet-stream")))
              for row in NUMBERS)
BODIES = tuple(Ask(json.dumps(body).encode(), kind) for row in NUMBERS[:6:2] for body, kind in (
    (row, ""), (row, "text/plain"), (row, JSON), ({"row": row}, JSON), ({"row": row}, "")))
SINGLE = [[number] for number in range(8)]

REQUESTS = (
    rows("kserve", "instances.py", envelope="kserve", asks=(
        *instances(SINGLE), *instances([[0, 1], [2, 3, 4], [5, 6, 7, 0, 1]]),
        Ask(b'{"instances": ["no row"]}', JSON, fails=True))),
    rows("kserve_v2", "named_inputs.py", envelope="kservev2", asks=(
        *map(tensors, SINGLE), *map(tensors, ([0, 1], [2, 3, 4], [5, 6, 7])))),
    rows("json_envelope", "instances.py", envelope="json", asks=(
        *instances(SINGLE), *instances([[0, 1], [2, 3, 4], [5, 6, 7, 0]]),
        Ask(b'{"instances": [[1, 2]]}', JSON, fails=True))),
    rows("several_parts", "several_parts.py", asks=PARTS),
    rows("kinds_of_bodies", "kinds_of_bodies.py", asks=BODIES),
    rows("pool", "pool.py"),
    rows("micro_batches", "micro_batches.py", asks=(*asks(), NO_ROW)),
    rows("event_loop", "event_loop.py"),
    rows("beating", "beating.py"),
    rows("kept_context", "kept_context.py"),
    rows("own_exception", "own_exception.py", asks=(*asks(), LARGE)),
    rows("over_grpc", asks=over(Over.GRPC)),
    rows("in_workflow", asks=over(Over.WORKFLOW)),
)
