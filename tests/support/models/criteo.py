"""Criteo's click records as a model's input: 13 counts and 26 categories, any of which may be missing.

A request is one record or a list of them, as JSON objects with the keys I1 to I13 and C1 to C26 (absent or null means
missing), or a binary batch: the four bytes CLK1, then 156 bytes a record, little-endian: 13 float32 (NaN means missing)
and 26 uint32 (0 means missing), the codes of the categories. The code of a string of eight hexadecimal digits, as in
Criteo's data, is its value. The code of any other string is its CRC-32, so an empty string also means missing.
"""

from __future__ import annotations

import csv
import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COUNTS = tuple(f"I{number}" for number in range(1, 14))
CATEGORIES = tuple(f"C{number}" for number in range(1, 27))
BUCKETS = 2000
"""The number of buckets of each category. The first bucket is for missing values."""
MAGIC = b"CLK1"
_RECORD = struct.Struct("<13f26I")
_KEYED = struct.Struct("<BI")


def decode(body: bytes | Mapping[str, Any] | Sequence[Any]) -> list[list[float]]:
    """Return the 39 numbers of each record of a request.

    Args:
        body: the bytes of a request, or the object that TorchServe parsed from JSON.

    Raises:
        ValueError: the body is neither JSON records nor a binary batch; the message says what was found.
    """
    if isinstance(body, (bytes, bytearray)) and body[:4] == MAGIC:
        rest = bytes(body[4:])
        if not rest or len(rest) % _RECORD.size:
            raise ValueError(f"expected records of {_RECORD.size} bytes after CLK1, found {len(rest)} bytes")
        return [features(record[:13], record[13:]) for record in _RECORD.iter_unpack(rest)]
    found = json.loads(body) if isinstance(body, (bytes, bytearray, str)) else body
    records = [found] if isinstance(found, Mapping) else found
    if not isinstance(records, Sequence) or not records or not all(isinstance(one, Mapping) for one in records):
        raise ValueError(f"expected a record or a list of records, found {type(found).__name__}")
    return [from_json(record) for record in records]


def encode(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return JSON records as a binary batch."""
    return MAGIC + b"".join(_RECORD.pack(*_values(record)) for record in records)


def from_json(record: Mapping[str, Any]) -> list[float]:
    """Return the 39 numbers of one record.

    Raises:
        ValueError: the record has an unknown key, or a count that is not a number.
    """
    values = _values(record)
    return features(values[:13], [int(code) for code in values[13:]])


def features(counts: Sequence[float], codes: Sequence[int]) -> list[float]:
    """Return log(1 + count) for each count, or 0 if it is missing or negative, and the bucket of each category.

    Args:
        counts: 13 counts; NaN means missing.
        codes: 26 codes; 0 means missing.
    """
    numbers = [math.log1p(count) if count > 0 else 0.0 for count in counts]
    return numbers + [float(bucket(field, code)) for field, code in enumerate(codes)]


def bucket(field: int, code: int) -> int:
    """Return the bucket of a code. The hash includes the field, so equal codes of two fields may get two buckets."""
    return 1 + zlib.crc32(_KEYED.pack(field, code)) % (BUCKETS - 1) if code else 0


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the label and the record of each row of a file with the columns label, I1-I13 and C1-C26."""
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield int(row.pop("label")), {key: value for key, value in row.items() if value}


def _values(record: Mapping[str, Any]) -> list[float]:
    unknown = sorted(set(record) - {*COUNTS, *CATEGORIES})
    if unknown:
        raise ValueError(f"expected keys among I1 to I13 and C1 to C26, found {unknown[0]!r}")
    return [*(_count(name, record.get(name)) for name in COUNTS), *(_code(record.get(name)) for name in CATEGORIES)]


def _count(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a number for {name}, found {value!r}") from error


def _code(value: Any) -> int:
    if value is None:
        return 0
    text = str(value)
    return int(text, 16) if re.fullmatch("[0-9a-f]{8}", text) else zlib.crc32(text.encode())
