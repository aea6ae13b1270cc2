"""Criteo's records: JSON, binary and CSV give the same 39 numbers, and missing values stay missing."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cifar import DataMissing, data_folder
from tests.support.models.criteo import BUCKETS, CATEGORIES, COUNTS, decode, encode, read_csv
from tests.support.skips import NO_DATA

RECORDS = st.lists(st.fixed_dictionaries({}, optional={
    **{name: st.integers(-2, 2**20) for name in COUNTS},
    **{name: st.one_of(st.text(max_size=9), st.integers(0, 2**32 - 1).map("{:08x}".format)) for name in CATEGORIES}}),
    min_size=1, max_size=5)


@given(RECORDS)
def test_json_and_binary_are_the_same_numbers(records: list[dict[str, Any]]) -> None:
    from_json = decode(json.dumps(records).encode())
    assert decode(encode(records)) == from_json == [decode(record)[0] for record in records]
    for record, numbers in zip(records, from_json):
        assert len(numbers) == 39
        for name, number in zip(COUNTS, numbers):
            assert number == pytest.approx(math.log1p(max(0, record.get(name, 0))))
        for name, number in zip(CATEGORIES, numbers[13:]):
            assert 0 <= number < BUCKETS and (number > 0 or record.get(name) in (None, "", "00000000"))


@pytest.mark.parametrize("body, found", [
    (b"CLK1" + bytes(155), "found 155 bytes"), (b"CLK1", "found 0 bytes"), (b"[]", "found list"), (b"3", "found int"),
    (b'{"I14": 1}', "'I14'"), (b'{"I1": "many"}', "'many'"), (b"\xff\xfe", "Expecting value")])
def test_what_is_no_record_is_named(body: bytes, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        decode(body)


def test_the_sample_of_criteo_is_read_with_its_gaps() -> None:
    try:
        rows = list(read_csv(data_folder() / "criteo-sample" / "criteo.csv"))
    except (DataMissing, FileNotFoundError) as missing:
        pytest.skip(f"{NO_DATA}: {missing}")
    records = [record for _, record in rows]
    assert {label for label, _ in rows} == {0, 1}
    n_missing = sum(39 - len(record) for record in records)
    assert n_missing > 0
    numbers = decode(encode(records))
    zeros = sum(number == 0 for row in numbers for number in row)
    n_zero_counts = sum(float(record.get(name, 1)) <= 0 for record in records for name in COUNTS)
    assert zeros == n_missing + n_zero_counts
    seen = {(column, number) for row in numbers for column, number in enumerate(row[13:])}
    values = {(column, record.get(name)) for record in records for column, name in enumerate(CATEGORIES)}
    assert len(seen) > 0.8 * len(values), "hashing keeps most categories apart"
