"""Sample requests in TorchServe's envelopes: JSON that holds a list of instances, or of named inputs."""

from __future__ import annotations

import json
from typing import Any

from early_exit.handler.errors import ArchiveError
from early_exit.handler.sample_request import Part, SampleRequest

_LISTS = ("instances", "inputs")


def in_one(first: SampleRequest, second: SampleRequest) -> SampleRequest:
    """Return one request with the contents of two.

    Raises:
        ArchiveError: one of them is not in an envelope.
    """
    (name, content), (_, others) = _read(first), _read(second)
    both = {**content, name: [*content[name], *others[name]]}
    part = first.parts[0]
    return SampleRequest((Part(json.dumps(both).encode(), part.content_type, part.name),))


def n_instances(sample: SampleRequest) -> int:
    """Return how many instances a request holds.

    Raises:
        ArchiveError: the request is not in an envelope.
    """
    name, content = _read(sample)
    return len(content[name])


def _read(sample: SampleRequest) -> tuple[str, dict[str, Any]]:
    part = sample.parts[0]
    try:
        content = json.loads(part.value)
        return next(name for name in _LISTS if isinstance(content.get(name), list)), content
    except (ValueError, AttributeError, StopIteration) as error:
        raise ArchiveError(f"expected a sample request in an envelope, JSON with a list of {' or '.join(_LISTS)}, "
                           f"found {part.value[:80]!r}") from error
