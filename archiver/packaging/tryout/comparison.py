"""Compares two answers: numbers up to rounding, everything else exactly."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from early_exit.archiver.packaging.tryout.answers import Answer, AnsweredBatch

TOLERANCE = 1e-4
"""The largest difference of two numbers that count as equal, relative to their scale."""
_LEAST = 1e-6
"""The same, relative to the largest number beside them: a smaller difference never counts."""
_APART = 1000.0
"""A number in a list that is so many times as large as those that differ is of another kind, such as a width."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_NUMPY = b"\x93NUMPY"
_LARGEST = 1e9
"""Bytes that would be float32 numbers above this limit are not treated as numbers."""


def differences(expected: Answer, found: Answer, ignored: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield where two answers differ, as a path such as $.scores[2], and how.

    Args:
        expected: the earlier answer.
        found: the present answer.
        ignored: the paths that are not compared.
    """
    yield from _Comparison(frozenset(ignored)).of_answers(expected, found)


def unstable(first: Sequence[Answer], second: Sequence[Answer]) -> tuple[tuple[str, ...], ...]:
    """Return for each answer the paths at which it differs from the second answer to the same request.

    Numbers outside of lists are compared exactly. The rounding that `differences` allows would hide a clock, which is a
    large number that advances by little.
    """
    comparison = _Comparison(frozenset(), is_exact=True)
    return tuple(tuple(dict.fromkeys(path for path, _ in comparison.of_answers(*pair))) for pair in zip(first, second))


def contradictions(expected: AnsweredBatch, found: Sequence[Answer]) -> list[str]:
    """Return how answers differ from the stable parts of the expected ones; empty if they do not differ."""
    told = []
    ignored = expected.unstable or ((),) * len(expected.answers)
    for number, before, now, paths in zip(expected.batch.samples, expected.answers, found, ignored):
        where = [f"{path}: {how}" for path, how in differences(before, now, paths)]
        if where:
            told.append(f"sample {number + 1} of {expected.batch}: {'; '.join(where[:3])}\n"
                        f"  before: {before}\n  now:    {now}")
    return told


def _value(body: bytes) -> Any:
    """Return the value of a body: parsed JSON, a text, an array of numbers, or the bytes."""
    if body.startswith(_NUMPY):
        return np.load(io.BytesIO(body), allow_pickle=False).tolist()
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return _floats(body)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _floats(body: bytes) -> Any:
    if len(body) % 4 == 0:
        with np.errstate(invalid="ignore"):
            numbers = np.frombuffer(body, np.float32)
            if np.isfinite(numbers).all() and np.abs(numbers).max(initial=0) < _LARGEST:
                return numbers.tolist()
    return body


@dataclass(frozen=True)
class _Comparison:
    """How answers are compared."""

    ignored: frozenset[str]
    """The paths of values that are not compared, and are ignored when the largest number of their object is found."""
    is_exact: bool = False
    """Whether numbers outside of lists must be the same to the last digit."""

    def of_answers(self, expected: Answer, found: Answer) -> Iterator[tuple[str, str]]:
        if expected.status != found.status:
            yield "status", f"{expected.status} has become {found.status}"
        if expected.content_type != found.content_type:
            yield "content type", f"{expected.content_type!r} has become {found.content_type!r}"
        if expected.body != found.body:
            yield from self.between(_value(expected.body), _value(found.body), "$", None)

    def between(self, expected: Any, found: Any, path: str, scale: float | None) -> Iterator[tuple[str, str]]:
        """Yield where two values differ.

        Args:
            expected: the value in the earlier answer.
            found: the value in the present answer.
            path: the path of the values.
            scale: the scale of the numbers in the list or object that holds the values; None if nothing holds them.
        """
        if path in self.ignored:
            return
        if _is_number(expected) and _is_number(found):
            alone = 0.0 if self.is_exact else abs(expected)
            if not _near(expected, found, alone if scale is None else scale):
                yield path, f"{expected} has become {found}"
        elif type(expected) is not type(found):
            yield path, f"{_short(expected)} has become {_short(found)}"
        elif isinstance(expected, dict):
            yield from self._between_objects(expected, found, path)
        elif isinstance(expected, list):
            yield from self._between_lists(expected, found, path)
        elif isinstance(expected, str):
            yield from self._between_texts(expected, found, path)
        elif expected != found:
            yield path, f"{_short(expected)} has become {_short(found)}"

    def _between_objects(self, expected: dict[str, Any], found: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
        if expected.keys() != found.keys():
            yield path, f"the keys {', '.join(expected)} have become {', '.join(found)}"
            return
        # Integers, such as an id, a width or a number of words, have nothing to do with the scores beside them.
        floats = [(value, found[key]) for key, value in expected.items()
                  if isinstance(value, float) and f"{path}.{key}" not in self.ignored]
        scale = 0.0 if self.is_exact else _scale_of_differing(floats)
        for key, value in expected.items():
            are_counts = isinstance(value, int) and isinstance(found[key], int)
            yield from self.between(value, found[key], f"{path}.{key}", None if are_counts else scale)
        largest = 0.0 if self.is_exact else _scale(before for before, _ in floats)
        for before, now in zip(expected, found):
            if before != now and not _tied(expected[before], expected[now], largest):
                yield path, f"the keys {', '.join(expected)} have become {', '.join(found)}, in another order"
                return

    def _between_lists(self, expected: list[Any], found: list[Any], path: str) -> Iterator[tuple[str, str]]:
        if len(expected) != len(found):
            yield path, f"{len(expected)} values have become {len(found)}"
            return
        scale = _scale_of_list(expected, found)
        left = {}
        for index, (before, now) in enumerate(zip(expected, found)):
            if told := list(self.between(before, now, f"{path}[{index}]", scale)):
                left[index] = told
        # Items whose numbers are equal may have changed places.
        free = set(left)
        for index, told in left.items():
            partner = next((other for other in free if not any(self.between(expected[index], found[other], "", scale))
                            and _tied(expected[index], expected[other], scale)), None)
            if partner is None:
                yield from told
            else:
                free.discard(partner)

    def _between_texts(self, expected: str, found: str, path: str) -> Iterator[tuple[str, str]]:
        if expected == found:
            return
        if not self.is_exact and _NUMBER.split(expected) == _NUMBER.split(found):
            before, now = (_NUMBER.findall(text) for text in (expected, found))
            scale = _scale_of_differing([(float(number), float(other)) for number, other in zip(before, now)
                                         if not number.lstrip("+-").isdigit()])
            if all(one == other or _near(float(one), float(other), scale) for one, other in zip(before, now)):
                return
        yield path, f"{_short(expected)} has become {_short(found)}"


def _tied(one: Any, other: Any, scale: float) -> bool:
    """Tell whether two items of a list have the same numbers, up to rounding, so that their order does not matter."""
    if _is_number(one) and _is_number(other):
        return _near(one, other, scale)
    numbers, others = list(_numbers(one)), list(_numbers(other))
    return bool(numbers) and len(numbers) == len(others) and all(
        _near(first, second, max(abs(first), abs(second))) for first, second in zip(numbers, others))


def _numbers(value: Any) -> Iterator[float]:
    if _is_number(value):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _numbers(inner)


def _scale(values: Any) -> float:
    return max((abs(value) for value in values if _is_number(value) and math.isfinite(value)), default=0.0)


def _scale_of_differing(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Return the scale of numbers that may be of different kinds, such as a width and a score.

    A number that is the same in both answers says nothing about the others, so the scale is the largest that differs.

    Args:
        pairs: each number in the earlier answer, with the one in the present answer.
    """
    differing = _scale(before for before, now in pairs if before != now)
    return max(differing, _LEAST / TOLERANCE * _scale(before for before, _ in pairs))


def _scale_of_list(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """Return the scale of the numbers in a list: the largest, unless it is of another kind than those that differ."""
    pairs = list(zip(expected, found))
    largest, differing = _scale(expected), _scale(before for before, now in pairs if before != now)
    return _scale_of_differing(pairs) if largest > max(1.0, _APART * differing) else largest


def _near(one: float, other: float, scale: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return one == other or (math.isnan(one) and math.isnan(other))
    return abs(one - other) <= TOLERANCE * scale


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
