"""The text and binary messages of the gateway's WebSocket, and which messages are refused."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.archiver.gateway.messages import TOO_BIG, UNSUPPORTED, Item, Limits, Malformed, read_message

LIMITS = Limits(items_per_message=5, bytes_per_item=100)
ITEMS = st.dictionaries(st.text(min_size=1, max_size=9), st.binary(max_size=40), max_size=5)


@given(ITEMS, st.booleans())
def test_text_and_bytes_carry_the_same_items(items: dict[str, bytes], anytime: bool) -> None:
    expected = [Item(name, body, anytime) for name, body in items.items()]
    text = json.dumps({"anytime": anytime, "items": [
        {"id": name, "data": base64.b64encode(body).decode()} for name, body in items.items()]})
    header = json.dumps({"anytime": anytime, "items": [
        {"id": name, "size": len(body)} for name, body in items.items()]}).encode()
    binary = len(header).to_bytes(4, "big") + header + b"".join(items.values())
    roomy = Limits(items_per_message=5)
    assert read_message(text, roomy) == read_message(binary, roomy) == expected


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_whatever_comes_is_read_or_refused_with_a_reason(message: bytes | str) -> None:
    try:
        read_message(message, LIMITS)
    except Malformed as refusal:
        assert str(refusal) and refusal.code in (UNSUPPORTED, TOO_BIG)


@pytest.mark.parametrize("message, code, reason", [
    ("nonsense", UNSUPPORTED, "expected JSON"), ("[]", UNSUPPORTED, "found list"),
    ('{"items": [1]}', UNSUPPORTED, "list of objects"), ('{"items": [{"id": 3}]}', UNSUPPORTED, "found 3"),
    ('{"items": [{"id": "a", "data": "*"}]}', UNSUPPORTED, "not base64"),
    ('{"items": [{"id": "a", "data": ""}, {"id": "a", "data": ""}]}', UNSUPPORTED, "different ids"),
    (json.dumps({"items": [{"id": str(n), "data": ""} for n in range(6)]}), TOO_BIG, "5 items"),
    ("x" * 401, TOO_BIG, "400 bytes"),
    (b'\0\0\0\x23{"items": [{"id": "a", "size": 3}]}ab', UNSUPPORTED, "add up to 3 bytes, 2 came")])
def test_what_is_wrong_is_named(message: str | bytes, code: int, reason: str) -> None:
    with pytest.raises(Malformed, match=reason) as refusal:
        read_message(message, LIMITS)
    assert refusal.value.code == code


def test_what_is_nested_too_deeply_is_malformed() -> None:
    with pytest.raises(Malformed, match="recursion") as refusal:
        read_message('{"items":' + 10_000 * "[", Limits())
    assert refusal.value.code == UNSUPPORTED
