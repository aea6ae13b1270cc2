"""Checks a version by its answer to the sample request, if the server's secret, which a probe needs, is not known.

`ee-archive` notes the new archive's answers to its sample request, at every fallback level. A version that gives the
same answer has very likely been loaded from that archive, and computes the same as the machine that made it. One answer
proves less than a probe, which goes through every stage and exit head: a sample leaves at one exit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from early_exit.archiver.control import Prediction
from early_exit.archiver.packaging.tryout.answers import as_read
from early_exit.handler.archive_contents import ArchiveContents
from early_exit.handler.engines.registry import ENGINES
from early_exit.handler.errors import ServerError
from early_exit.handler.protocol import EXIT_HEADER


def require_same_answer(contents: ArchiveContents, engine: str, prediction: Prediction) -> None:
    """Check that a version answers its archive's sample request as the archive did where it was made.

    Args:
        contents: the contents of the archive, with sample answers.
        engine: the name of the archive's engine, whose tolerance for the probe holds for the numbers of an answer, too.
        prediction: the version's answer.

    Raises:
        ServerError: the answers differ; the message names the first difference.
    """
    left_at = prediction.headers.get(EXIT_HEADER.lower(), "")
    if left_at not in contents.sample_answers:
        raise ServerError(f"the sample request left at {left_at or 'an unknown exit'}, but at "
                          f"{' or '.join(contents.sample_answers)} where the archive was made: is this archive in the "
                          "server's model store?")
    difference = first_difference(contents.sample_answers[left_at], as_read(prediction.body),
                                  ENGINES[engine].max_probe_error)
    if difference is not None:
        raise ServerError(f"the sample request is answered differently than where the archive was made: {difference}. "
                          "Is this archive in the server's model store, and does this machine compute like the one "
                          "that made it?")


def first_difference(expected: Any, found: Any, tolerance: float, place: str = "answer") -> str | None:
    """Return where two answers differ; None if they agree.

    Args:
        expected: parsed JSON.
        found: parsed JSON.
        tolerance: the difference that numbers with a fraction may have, relative to the larger one or to 1.
        place: the name of the compared value.

    >>> first_difference({"cat": 0.61, "dog": 0.2}, {"cat": 0.6101, "dog": 0.2}, 1e-3)
    >>> first_difference({"class": 3}, {"class": 4}, 0.5)
    'answer.class is 4, expected 3'
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping) and expected.keys() == found.keys():
        parts = [(expected[key], found[key], f"{place}.{key}") for key in expected]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        parts = [(*pair, f"{place}[{number}]") for number, pair in enumerate(zip(expected, found))]
    elif expected == found or (isinstance(expected, float) and isinstance(found, float)
                               and abs(expected - found) <= tolerance * max(1.0, abs(expected), abs(found))):
        return None
    else:
        return f"{place} is {found!r:.80}, expected {expected!r:.80}"
    differences = (first_difference(*part[:2], tolerance, part[2]) for part in parts)
    return next((difference for difference in differences if difference is not None), None)
