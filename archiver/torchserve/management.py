"""The clients of one TorchServe: a synchronous one for rolls and watchers, and an asynchronous one for the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from early_exit.archiver.control import Claim, Prediction, RunSettings, VersionStatus
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.api import Api, ApiRequest, Conversation, T
from early_exit.archiver.torchserve.tokens import TokenAuth, TokenKind, read_secret
from early_exit.archiver.version_metrics import Scrape
from early_exit.handler.errors import ServerError
from early_exit.handler.protocol import SECRET_HEADER
from early_exit.handler.sample_request import Part, SampleRequest
from early_exit.training.credentials import without_credentials

_ROLL_S = 30.0
"""The time limit for any answer that a roll waits for."""
_LOOK_S = 10.0
"""The time limit for requests of the gateway, except for predictions."""


class Management:
    """The client of a TorchServe for rollout and watch, a `ModelServer`."""

    def __init__(self, addresses: Addresses, key_file: Path | None, secret_file: Path | None = None) -> None:
        """Remember the addresses of the server and the files with its tokens and its secret.

        Args:
            addresses: the addresses on which the server listens.
            key_file: TorchServe's key_file.json; None if its token authorisation is off.
            secret_file: the file with the secret of the server's workers, which need not exist. It is read for each
                request, because a server makes a new secret at each start.
        """
        self._secret_file = secret_file
        self._addresses, self._api, self._auth = addresses, Api(addresses), _auth(addresses, key_file)
        # Between two calls a server may be restarted, so no connection is kept for the next one.
        self._client = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))

    def __str__(self) -> str:
        return without_credentials(self._addresses.management)

    @property
    def has_secret(self) -> bool:
        """Whether the secret of the server's workers is known."""
        return read_secret(self._secret_file) is not None

    def models(self) -> list[str]:
        """Return the names of the models that are registered."""
        return self._hold(self._api.models())

    def versions(self, model: str) -> list[VersionStatus]:
        """Return the registered versions of a model; none if the model is not registered."""
        return self._hold(self._api.versions(model))

    def named_requests(self, model: str, version: str) -> float | None:
        """Return how many requests have named a version; None if the server has no metrics, or does not answer."""
        try:
            return self._hold(self._api.named_requests(model, version))
        except ServerError:
            return None

    def register(self, file_name: str, settings: RunSettings, *, model: str | None = None,
                 claim: Claim | None = None) -> None:
        """Load an archive of the model store as a new version; its workers start in the background."""
        self._hold(self._api.register(file_name, settings, model, claim))

    def scale(self, model: str, version: str, workers: tuple[int, int]) -> None:
        """Set the smallest and the largest number of workers of a version; they start in the background."""
        self._hold(self._api.scale(model, version, workers))

    def set_default(self, model: str, version: str, *, limit_s: float) -> None:
        """Send the requests that name no version to this one from now on."""
        self._hold(self._api.set_default(model, version), limit_s)

    def unregister(self, model: str, version: str) -> None:
        """Remove a version at once, with the requests that it has not answered."""
        self._hold(self._api.unregister(model, version))

    def probe(self, model: str, version: str) -> dict[str, Any]:
        """Let a version check itself through the inference address."""
        return self._hold(self._api.probe(model, version))

    def predict(self, model: str, version: str, request: SampleRequest, *, to_the_end: bool = False) -> Prediction:
        """Return a version's answer to a request.

        Raises:
            ServerError: the status of the answer is not 200.
        """
        prediction = self._hold(self._api.predict(model, request, version=version, anytime=to_the_end))
        if prediction.error is not None:
            raise ServerError(f"{model} {version} answered a request with {prediction.status}: {prediction.error}")
        return prediction

    def _hold(self, conversation: Conversation[T], limit_s: float = _ROLL_S) -> T:
        try:
            request = next(conversation)
            while True:
                request = conversation.send(self._send(request, limit_s))
        except StopIteration as end:
            learnt: T = end.value
            return learnt

    def _send(self, request: ApiRequest, limit_s: float) -> httpx.Response:
        try:
            return self._client.request(**_as_httpx(request, self._secret_file), auth=self._auth[request.token],
                                        timeout=httpx.Timeout(0.75 * limit_s, connect=0.25 * limit_s))
        except httpx.HTTPError as error:
            raise _no_answer(request, error) from error


class AsyncManagement:
    """The client of a TorchServe for the gateway, an `Upstream`."""

    def __init__(self, addresses: Addresses, key_file: Path | None, secret_file: Path | None = None, *,
                 connections: int, prediction_s: float) -> None:
        """Remember the addresses of the server and the files with its tokens and its secret.

        Args:
            addresses: the addresses on which the server listens.
            key_file: TorchServe's key_file.json; None if its token authorisation is off.
            secret_file: the file with the secret of the server's workers, which need not exist.
            connections: the largest number of predictions at once.
            prediction_s: the time limit for a prediction, waiting in TorchServe's queue included.
        """
        self._secret_file = secret_file
        self._api, self._auth, self._prediction_s = Api(addresses), _auth(addresses, key_file), prediction_s
        self._client = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(
            max_connections=connections + 4, max_keepalive_connections=connections + 4))

    async def close(self) -> None:
        await self._client.aclose()

    async def predict(self, model: str, body: bytes, *, anytime: bool) -> Prediction:
        """Return the answer of a model's default version, whatever its status."""
        return await self._hold(self._api.predict(model, SampleRequest((Part(body),)), anytime=anytime),
                                self._prediction_s)

    async def models(self) -> list[str]:
        """Return the names of the models that are registered."""
        return await self._hold(self._api.models())

    async def versions(self, model: str) -> list[VersionStatus]:
        """Return the registered versions of a model; none if the model is not registered."""
        return await self._hold(self._api.versions(model))

    async def metrics(self) -> Scrape:
        """Return the metrics of the server; raises a ValueError if the server answers with something else."""
        return await self._hold(self._api.metrics())

    async def _hold(self, conversation: Conversation[T], limit_s: float = _LOOK_S) -> T:
        try:
            request = next(conversation)
            while True:
                request = conversation.send(await self._send(request, limit_s))
        except StopIteration as end:
            learnt: T = end.value
            return learnt

    async def _send(self, request: ApiRequest, limit_s: float) -> httpx.Response:
        try:
            return await self._client.request(**_as_httpx(request, self._secret_file), auth=self._auth[request.token],
                                              timeout=httpx.Timeout(limit_s, connect=5.0))
        except httpx.HTTPError as error:
            raise _no_answer(request, error) from error


def _auth(addresses: Addresses, key_file: Path | None) -> dict[TokenKind, TokenAuth | None]:
    kinds: tuple[TokenKind, ...] = ("inference", "management")
    return {kind: TokenAuth(key_file, kind, addresses.management) if key_file else None for kind in kinds}


def _as_httpx(request: ApiRequest, secret_file: Path | None) -> dict[str, Any]:
    secret = read_secret(secret_file) if request.needs_secret else None
    # Each part has a file name, because TorchServe passes on the content types of files only.
    sent = {"files": [(part.name, (part.name, part.value, part.content_type)) for part in request.form]} if (
        request.form) else {"content": request.body}
    return {"method": request.method, "url": request.url, "params": request.params or None,
            "headers": request.headers | ({SECRET_HEADER: secret} if secret else {}), **sent}


def _no_answer(request: ApiRequest, error: httpx.HTTPError) -> ServerError:
    return ServerError(f"no answer from {without_credentials(request.url)}: {type(error).__name__}. Is TorchServe "
                       "running there?")
