"""Credentials in URLs, which are for the server that the URL names and for no log, error message or page."""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")
_HIDDEN = "***"
_USER_INFO = re.compile(
    r"(?<=://)(?:[^\s/?#\"<>]*@"
    r"|[^\s/?#\"<>:@]+:(?!\d+(?:[/?#]|$))[^\s\"<>]*@)"
    r"|(?<![\w/.:@-])[\w.+-]+:[^\s/\"<>:]+@(?=[\w.-]+:\d)")
"""What stands before the host: also where a password holds an '@', or what should be quoted in it, or the scheme is
forgotten before a host with a port."""
_SECRET_PARAMETER = re.compile(r"([?&][\w.-]*(?:token|secret|sig|password|credential|key)[\w.-]*=)[^\s&#'\"<>]+", re.I)


def without_credentials(text: str) -> str:
    """Return a text whose URLs name neither a user with a password or token, nor a signature or key as a parameter.

    >>> without_credentials("no answer from https://me:secret@host:8081/ping?n=1 or https://a/b?sig=ab12&n=2")
    'no answer from https://***@host:8081/ping?n=1 or https://a/b?sig=***&n=2'
    """
    return _SECRET_PARAMETER.sub(rf"\g<1>{_HIDDEN}", _USER_INFO.sub(f"{_HIDDEN}@", text))


def all_without_credentials(value: T) -> T:
    """Return data as JSON has it, with every text in it, keys aside, as `without_credentials` returns it."""
    redacted: object = value
    if isinstance(value, str):
        redacted = without_credentials(value)
    elif isinstance(value, dict):
        redacted = {key: all_without_credentials(inner) for key, inner in value.items()}
    elif isinstance(value, (list, tuple)):
        redacted = [all_without_credentials(inner) for inner in value]
    return redacted  # type: ignore[return-value]
