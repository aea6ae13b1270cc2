"""Which differences between the answers of the original and of the new archive count, and which do not."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.archiver.packaging.tryout.answers import Answer, AnsweredBatch, Batch
from early_exit.archiver.packaging.tryout.comparison import contradictions, differences, unstable


def answer(body: Any, status: int = 200, content_type: str = "application/json") -> Answer:
    return Answer(status, content_type, body if isinstance(body, bytes) else json.dumps(body).encode())


def same(before: Any, after: Any) -> bool:
    return not list(differences(answer(before), answer(after)))


numbers = st.floats(-1e3, 1e3, allow_nan=False)
values = st.recursive(st.none() | st.booleans() | numbers | st.text(max_size=8),
                      lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=4), inner, max_size=4))


@given(values)
def test_an_answer_is_the_same_as_itself(value: Any) -> None:
    assert same(value, value)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.data())
def test_a_number_that_moved_by_more_than_the_tolerance_is_found(scores: list[float], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(scores) - 1))
    rounded = [score + 5e-5 * max(scores) * (number == row) for number, score in enumerate(scores)]
    moved = [score + 5e-4 * max(scores) * (number == row) for number, score in enumerate(scores)]
    assert same(scores, rounded)
    assert not same(scores, moved)


@given(st.lists(st.floats(0.1, 1), min_size=2, max_size=5, unique_by=lambda score: round(score, 2)))
def test_the_order_of_keys_with_other_numbers_counts(scores: list[float]) -> None:
    ranked = {f"class {number}": score for number, score in enumerate(scores)}
    assert not same(ranked, dict(reversed(ranked.items())))


@pytest.mark.parametrize(("before", "after"), [
    ({"cat": 0.5, "dog": 0.500001}, {"dog": 0.500001, "cat": 0.5}),
    ([{"label": "cat", "score": 0.5}, {"label": "dog", "score": 0.500001}],
     [{"label": "dog", "score": 0.500001}, {"label": "cat", "score": 0.5}]),
    ("cat 0.12345678", "cat 0.12345679"),
    ([0.0, 1.0], [1e-6, 1.0]), ([15.0, 0.001], [15.0, 0.001004]),
    ({"cat": 15.0, "dog": 0.001}, {"cat": 15.0, "dog": 0.001004}),
    ({"width": 1920.0, "score": 0.31}, {"width": 1920.0, "score": 0.31001}),
    ("size 1920.5 px, cat 0.31", "size 1920.5 px, cat 0.31001"),
])
def test_rounding_and_the_order_of_equals_do_not_count(before: Any, after: Any) -> None:
    assert same(before, after)


@pytest.mark.parametrize(("before", "after"), [
    ({"cat": 0.6, "dog": 0.4}, {"dog": 0.4, "cat": 0.6}),
    ([{"label": "cat", "score": 0.6}, {"label": "dog", "score": 0.4}],
     [{"label": "dog", "score": 0.6}, {"label": "cat", "score": 0.4}]),
    ("cat 0.5", "dog 0.5"), ("cat 0.5", "cat 0.6"), ([1, 2], [1, 2, 3]), ({"a": 1}, {"b": 1}), (True, 1), ("1", 1),
    ({"width": 1920, "score": 0.4}, {"width": 1920, "score": 0.41}),
    ({"id": 281, "score": 0.4}, {"id": 282, "score": 0.4}),
    ("width 1920, score 0.4", "width 1920, score 0.41"), ("class 281 of 21000", "class 282 of 21000"),
    ({"width": 1920.0, "score": 0.31}, {"width": 1920.0, "score": 0.12}),
    ({"limit": 250000.0, "probability": 0.9}, {"limit": 250000.0, "probability": 0.1}),
    ([250000.0, 0.9], [250000.0, 0.1]), ([21000, 5], [21000, 6]),
    ("size 1920.5 px, cat 0.31", "size 1920.5 px, cat 0.12"),
    (None, []), ([True, False], [False, True]), (b"\x89PNG\xff\x00", b"\x89PNG\xff\x01"),
])
def test_anything_else_counts(before: Any, after: Any) -> None:
    assert not same(before, after)


def test_arrays_are_compared_as_numbers_however_they_are_sent() -> None:
    scores = np.array([[0.1, 0.9]], np.float32)

    def as_file(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    for sent in (np.ndarray.tobytes, as_file):
        assert same(sent(scores), sent(scores + 1e-6))
        assert not same(sent(scores), sent(scores[:, ::-1].copy()))


def test_status_and_content_type_count() -> None:
    assert [path for path, _ in differences(answer([1]), answer([1], 500, "text/plain"))] == ["status", "content type"]


def test_what_the_original_does_not_repeat_is_not_compared_and_all_else_is() -> None:
    first, second = ({"time": time, "id": f"request {time}", "scores": [0.1, 0.9]} for time in (1, 2))
    before = AnsweredBatch(Batch((0,)), (answer(first),), unstable([answer(first)], [answer(second)]))
    assert before.unstable == (("$.time", "$.id"),)
    assert contradictions(before, [answer({"time": 3, "id": "x", "scores": [0.1, 0.9]})]) == []
    [told] = contradictions(before, [answer({"time": 3, "id": "x", "scores": [0.9, 0.1]})])
    assert '"scores": [0.1, 0.9]' in told and '"scores": [0.9, 0.1]' in told, "a refusal shows both answers"


def test_a_clock_is_found_though_it_hardly_moves_and_hides_no_score_beside_it() -> None:
    first, second = ({"cat": 0.9, "dog": 0.1, "time": 1.7e9 + passed} for passed in (0.0, 0.01))
    before = AnsweredBatch(Batch((0,)), (answer(first),), unstable([answer(first)], [answer(second)]))
    assert before.unstable == (("$.time",),)
    assert contradictions(before, [answer({"cat": 0.9, "dog": 0.1, "time": 2e9})]) == []
    assert contradictions(before, [answer({"cat": 0.8, "dog": 0.2, "time": 2e9})]) != []


def test_rounding_that_varies_in_a_list_of_numbers_is_compared_all_the_same() -> None:
    assert unstable([answer([0.1, 0.9])], [answer([0.1000001, 0.9])]) == ((),)
