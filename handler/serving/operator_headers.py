"""Headers that make a worker run a request through the whole model: they count only where its operator sends them.

All clients of a server hold the same inference key, and each of these headers costs a full pass.
"""

from __future__ import annotations

import hmac
import logging
import os

from early_exit.handler.call import Call
from early_exit.handler.protocol import ANYTIME_HEADER, PROBE_HEADER, SECRET_HEADER, SECRET_VARIABLE

logger = logging.getLogger(__name__)

_COSTLY = (PROBE_HEADER, ANYTIME_HEADER)


class OperatorHeaders:
    """Takes the headers that a sender may not use off its requests, so that nothing behind it has to ask again."""

    def __init__(self, secret: str, *, are_open: bool) -> None:
        """Remember what makes a sender the operator.

        Args:
            secret: that of the server; an empty one is none, and nobody is the operator.
            are_open: whether every sender may use the headers.
        """
        self._secret, self._are_open = secret.encode(), are_open
        self._has_told = False

    @classmethod
    def of_environment(cls, *, are_open: bool) -> OperatorHeaders:
        """Return the headers' guard with the secret that the worker was started with, if there is one."""
        return cls(os.environ.get(SECRET_VARIABLE, "").strip(), are_open=are_open)

    def admit(self, call: Call) -> Call:
        """Return a request with those headers only that count; the secret stays here, whoever sent it."""
        if self._are_open or self._is_operators(call):
            return call.without_headers([SECRET_HEADER])
        if not self._has_told and any(call.has_header(name) for name in _COSTLY):
            self._has_told = True  # one line: it costs a client nothing to send more
            logger.warning("a request with %s came without the secret of %s, so it is answered as if it had no such "
                           "header, and so are those that follow; 'early_exit: {open_headers: true}' in "
                           "model-config.yaml lets all clients use them", " or ".join(_COSTLY), SECRET_VARIABLE)
        return call.without_headers([SECRET_HEADER, *_COSTLY])

    def _is_operators(self, call: Call) -> bool:
        return bool(self._secret) and any(hmac.compare_digest(value.encode(), self._secret)
                                          for value in call.header_values(SECRET_HEADER))
