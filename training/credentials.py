"""Hides credentials in URLs: they are for the server that the URL names, not for a log, an error message or a page."""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")
_HIDDEN = "***"
_USER_INFO = re.compile(
    r"(?<=://)(?:[^\s/?#\"<>]*@"
    r"|[^\s/?#\"<>:@]+:(?!\d+(?:[/?#]|$))[^\s\"<>]*@)"
    r"|(?<![\w/.:@-])[\w.+-]+:[^\s/\"<>:]+@(?=[\w.-]+:\d)")
"""The user information before the host. It is also found if the password contains an '@' or a character that should be
quoted, and if the scheme is missing before a host with a port."""
_SECRET_PARAMETER = re.compile(r"([?&][\w.-]*(?:token|secret|sig|password|credential|key)[\w.-]*=)[^\s&#'\"<>]+", re.I)


def without_credentials(text: str) -> str:
    """Return the text without user names, passwords and tokens in its URLs, and without signatures and keys in their
    parameters.

    >>> without_credentials("no answer from https://me:secret@host:8081/ping?n=1 or https://a/b?sig=ab12&n=2")
    'no answer from https://***@host:8081/ping?n=1 or https://a/b?sig=***&n=2'
    """
    return _SECRET_PARAMETER.sub(rf"\g<1>{_HIDDEN}", _USER_INFO.sub(f"{_HIDDEN}@", text))


def all_without_credentials(value: T) -> T:
    """Return JSON data with `without_credentials` applied to every string in it except keys."""
    redacted: object = value
    if isinstance(value, str):
        redacted = without_credentials(value)
    elif isinstance(value, dict):
        redacted = {key: all_without_credentials(inner) for key, inner in value.items()}
    elif isinstance(value, (list, tuple)):
        redacted = [all_without_credentials(inner) for inner in value]
    return redacted  # type: ignore[return-value]
