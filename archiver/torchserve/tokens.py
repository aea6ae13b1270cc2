"""The credentials of TorchServe's clients: its tokens, renewed when they are refused, and the secret of its workers."""

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
"""TorchServe writes its tokens into this file, in the folder in which it is started."""
SECRET_FILE = "secret"
"""`ee-serve` writes the secret of its workers into this file, beside the tokens."""
TokenKind = Literal["inference", "management"]
_RENEWING = "API"
"""The kind of token with which new tokens are requested."""
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
        raise ServerError(f"cannot use the {kind} token: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(f"cannot read the {kind} token from {key_file}: {error!r}. TorchServe writes {KEY_FILE} "
                          "into the folder in which it is started; pass it with --tokens") from error
    return key


def read_secret(secret_file: Path | None) -> str | None:
    """Return the secret of a server's workers; None if there is no such file.

    Raises:
        ServerError: the file cannot be read, holds something that a header cannot carry, is a link, or is somebody
            else's. A link, or somebody else's file, could make us send the secret or the keys of one server to another
            server, which an attacker controls.
    """
    if secret_file is None:
        return None
    try:
        secret = read_private(secret_file).strip()
    except FileNotFoundError:
        return None
    except ForeignFileError as error:
        raise ServerError(f"cannot use the secret of a server's workers: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"cannot read the secret of a server's workers from {secret_file}: {type(error).__name__}. "
                          "Expected one line of ASCII") from error
    if not (secret and secret.isascii() and secret.isprintable()):
        raise ServerError(f"expected one line of ASCII in {secret_file}, the secret of a server's workers, found "
                          f"{len(secret.splitlines())} lines")
    return secret


class TokenAuth(httpx.Auth):
    """Signs requests with one kind of token, and gets a new token when TorchServe refuses the old one.

    A watcher runs for longer than its tokens are valid. TorchServe writes the new token into its key file, which also
    has the token that a renewal needs.
    """

    requires_response_body = True

    def __init__(self, key_file: Path, kind: TokenKind, management: str) -> None:
        """Remember the file with the tokens, and the address that gives new ones.

        Args:
            key_file: TorchServe's key file; it is read for each request, because other clients renew tokens, too.
            kind: 'inference' or 'management'.
            management: TorchServe's management address.
        """
        self._key_file, self._kind, self._management = key_file, kind, management
        self._renewing = asyncio.Lock()

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send a request, and once more with a new token if the first one is refused."""
        sent = self._sign(request)
        response = yield request
        response.read()
        if _is_refused(response):
            if self._token() == sent:
                yield self._renewal()
            self._sign(request)
            yield request

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Do the same asynchronously; if several requests are refused at once, the first one gets the new token."""
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
