"""Headers that make a worker run a request through the whole model. They are ignored unless the operator sends them.

All clients of a server share the same inference key, and each of these headers costs a full pass.
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
    """Removes headers from a request if its sender may not use them, so that no other code has to check the sender."""

    def __init__(self, secret: str, *, are_open: bool) -> None:
        """Take the secret that the operator sends.

        Args:
            secret: the secret of the server; if it is empty, no sender is the operator.
            are_open: whether every sender may use the headers.
        """
        self._secret, self._are_open = secret.encode(), are_open
        self._has_told = False

    @classmethod
    def of_environment(cls, *, are_open: bool) -> OperatorHeaders:
        """Create an instance with the secret in the environment of the worker, if there is one."""
        return cls(os.environ.get(SECRET_VARIABLE, "").strip(), are_open=are_open)

    def admit(self, call: Call) -> Call:
        """Return a request without the secret, and without these headers if its sender may not use them."""
        if self._are_open or self._is_operators(call):
            return call.without_headers([SECRET_HEADER])
        if not self._has_told and any(call.has_header(name) for name in _COSTLY):
            self._has_told = True  # only once, because clients can send any number of such requests
            logger.warning("a request with %s came without the secret in %s, so the header is ignored, in this and in "
                           "later requests without the secret. 'early_exit: {open_headers: true}' in model-config.yaml "
                           "lets all clients use these headers", " or ".join(_COSTLY), SECRET_VARIABLE)
        return call.without_headers([SECRET_HEADER, *_COSTLY])

    def _is_operators(self, call: Call) -> bool:
        return bool(self._secret) and any(hmac.compare_digest(value.encode(), self._secret)
                                          for value in call.header_values(SECRET_HEADER))
