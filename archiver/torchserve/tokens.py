"""The tokens that let a client of TorchServe in: read from its key file, and renewed when they are refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Literal

import httpx

from early_exit.handler.errors import ForeignFileError, ServerError
from early_exit.handler.files.private import read_private

KEY_FILE = "key_file.json"
"""TorchServe writes its tokens into this file, in the folder it is started in."""
TokenKind = Literal["inference", "management"]
_RENEWING = "API"
"""Kind of the token that new tokens are asked for with."""
_REFUSED = "Token either incorrect, expired"
"""TorchServe's answer to a token that is wrong or has expired contains these words."""


def read_token(key_file: Path, kind: str) -> str:
    """Return the 'management', 'inference' or 'API' token of TorchServe's key file.

    Raises:
        ServerError: the file is missing, not a key file, a link, or somebody else's.
    """
    try:
        key: str = json.loads(read_private(key_file))[kind]["key"]
    except ForeignFileError as error:
        raise ServerError(f"cannot take the {kind} token: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(f"cannot read the {kind} token from {key_file}: {error!r}. TorchServe writes {KEY_FILE} "
                          "into the folder it is started in; pass it with --tokens") from error
    return key


class TokenAuth(httpx.Auth):
    """Signs requests with one kind of token and gets a new one where TorchServe says that the old one is refused.

    A watcher outlives its tokens. TorchServe writes the new one into its key file, and accepts the token for this from
    that file only.
    """

    requires_response_body = True

    def __init__(self, key_file: Path, kind: TokenKind, management: str) -> None:
        """Remember where tokens are and where new ones are had.

        Args:
            key_file: TorchServe's; read for each request, as other clients renew tokens too.
            kind: 'inference' or 'management'.
            management: TorchServe's management address.
        """
        self._key_file, self._kind, self._management = key_file, kind, management
        self._renewing = asyncio.Lock()

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send a request, and once more with a new token where the first is refused."""
        sent = self._sign(request)
        response = yield request
        response.read()
        if _is_refused(response):
            if self._token() == sent:
                yield self._renewal()
            self._sign(request)
            yield request

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Do the same; of all requests that are refused at once, the first gets the new token."""
        sent = self._sign(request)
        response = yield request
        await response.aread()
        if _is_refused(response):
            async with self._renewing:
                if self._token() == sent:
                    yield self._renewal()
            self._sign(request)
            yield request

    def _token(self) -> str:
        return read_token(self._key_file, self._kind)

    def _sign(self, request: httpx.Request) -> str:
        token = self._token()
        request.headers["Authorization"] = f"Bearer {token}"
        return token

    def _renewal(self) -> httpx.Request:
        return httpx.Request("GET", f"{self._management}/token", params={"type": self._kind},
                             headers={"Authorization": f"Bearer {read_token(self._key_file, _RENEWING)}"})


def _is_refused(response: httpx.Response) -> bool:
    return response.status_code in (400, 401) and _REFUSED in response.text
