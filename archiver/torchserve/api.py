"""TorchServe's API: the one place that knows its paths, its JSON and its errors.

An exchange with the server is a conversation: a generator that yields requests, receives the response to each, and
returns the result. It sends nothing itself, so the synchronous client and the asynchronous one can both use it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from early_exit.archiver.control import Claim, Prediction, RunSettings, VersionStatus
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.metrics import named_requests, read_metrics
from early_exit.archiver.torchserve.tokens import TokenKind
from early_exit.archiver.version_metrics import Scrape
from early_exit.handler.errors import ServerError
from early_exit.handler.files.names import bare_name
from early_exit.handler.protocol import ANYTIME_HEADER, PROBE_BODY, PROBE_HEADER, SECRET_VARIABLE
from early_exit.handler.sample_request import Part, SampleRequest
from early_exit.training.credentials import without_credentials

T = TypeVar("T")
_MODELS_A_PAGE = 100
"""The largest number of models that TorchServe names in one answer."""
_CLAIM = re.compile(r"ee-roll-(\d{1,18})-([0-9a-z]{1,32})")
"""A claim as a folder that does not exist: TorchServe 0.12 looks only for the last part of the URL in its model store,
but describes the version with the whole URL."""


@dataclass(frozen=True)
class ApiRequest:
    """A request to TorchServe, without its token."""

    method: str
    url: str
    token: TokenKind = "management"
    """The kind of token that the request needs."""
    params: dict[str, str | int] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    form: tuple[Part, ...] = ()
    """The parts of a form, which is sent instead of a body."""
    needs_secret: bool = False
    """Whether the request asks for a full pass, which workers run only if it has their secret."""


Conversation = Generator[ApiRequest, httpx.Response, T]


class Api:
    """The conversations with one server; each raises a ServerError if a response is a refusal."""

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses

    def models(self) -> Conversation[list[str]]:
        """Get the names of the models that are registered."""
        names: list[str] = []
        page: dict[str, Any] = {"nextPageToken": "0"}
        while "nextPageToken" in page:
            page = _json((yield ApiRequest("GET", f"{self._addresses.management}/models", params={
                "limit": _MODELS_A_PAGE, "next_page_token": page["nextPageToken"]})))
            names += (model["modelName"] for model in page["models"])
        return names

    def versions(self, model: str) -> Conversation[list[VersionStatus]]:
        """Get the registered versions of a model; none if the model is not registered."""
        described = yield ApiRequest("GET", self._model(model))  # without a version, TorchServe describes the default
        # If the default was removed while another version was registered, there are versions but no default.
        default = None if described.status_code == 404 else _json(described)[0]["modelVersion"]
        versions = yield ApiRequest("GET", self._model(model, "all"))
        return [] if versions.status_code == 404 else [_status(version, default) for version in _json(versions)]

    def register(self, file_name: str, settings: RunSettings, model: str | None,
                 claim: Claim | None) -> Conversation[None]:
        """Load an archive of the model store as a new version; its workers start in the background."""
        told = {"url": f"ee-roll-{claim.ticket}-{claim.nonce}/{file_name}" if claim else file_name,
                "model_name": model, "synchronous": "false",
                "batch_size": settings.batch_size, "max_batch_delay": settings.max_batch_delay_ms,
                "response_timeout": settings.response_timeout_s,
                "initial_workers": settings.workers and settings.workers[0]}
        _require_ok((yield ApiRequest("POST", f"{self._addresses.management}/models", params={
            name: value for name, value in told.items() if value is not None})))

    def scale(self, model: str, version: str, workers: tuple[int, int]) -> Conversation[None]:
        """Set the smallest and the largest number of workers of a version; they start in the background."""
        _require_ok((yield ApiRequest("PUT", self._model(model, version), params={
            "min_worker": workers[0], "max_worker": workers[1], "synchronous": "false"})))

    def set_default(self, model: str, version: str) -> Conversation[None]:
        """Send the requests that name no version to this one from now on."""
        _require_ok((yield ApiRequest("PUT", self._model(model, version, "set-default"))))

    def unregister(self, model: str, version: str) -> Conversation[None]:
        """Remove a version at once, with the requests that it has not answered."""
        _require_ok((yield ApiRequest("DELETE", self._model(model, version))))

    def probe(self, model: str, version: str) -> Conversation[dict[str, Any]]:
        """Let a version check itself, and get the result."""
        response = yield ApiRequest("POST", self._prediction(model, version), "inference",
                                    headers={PROBE_HEADER: "1", "content-type": "application/json"}, body=PROBE_BODY,
                                    needs_secret=True)
        said = _out_of_envelope(_parsed(response))
        if not isinstance(said, dict) or not ("probe" in said or said.get("type") == "ProbeFailed"):
            raise ServerError(f"{model} {version} answered its probe with {response.status_code}: {_message(response)}"
                              "\nIf it gives this answer to any request, its workers do not know the secret that was "
                              f"sent: expected the secret in the variable {SECRET_VARIABLE} of this server; pass the "
                              "file with that secret as --secret")
        _require_ok(response)
        return said

    def predict(self, model: str, request: SampleRequest, *, version: str | None = None,
                anytime: bool = False) -> Conversation[Prediction]:
        """Get the answer to a request, whatever its status: this conversation does not raise for a refusal.

        Args:
            model: the name of a served model.
            request: a body, or the parts of a form.
            version: a registered version; by default the model's default.
            anytime: whether the request runs to the end and gets the answers of all exits; without the secret of the
                workers, this works only if their configuration opens it to clients.
        """
        headers = {ANYTIME_HEADER: "1"} if anytime else {}
        url, whole = self._prediction(model, version), request.body
        if whole is None:
            response = yield ApiRequest("POST", url, "inference", headers=headers, form=request.parts,
                                        needs_secret=anytime)
        else:
            response = yield ApiRequest("POST", url, "inference", body=whole.value, needs_secret=anytime,
                                        headers={"content-type": whole.content_type, **headers})
        return Prediction(response.status_code, {name.lower(): value for name, value in response.headers.items()},
                          response.content, None if response.is_success else _message(response))

    def named_requests(self, model: str, version: str) -> Conversation[float | None]:
        """Count the requests that have named a version; None if the server has no metrics."""
        response = yield ApiRequest("GET", f"{self._addresses.metrics}/metrics", "inference")
        return named_requests(response.text, model, version) if response.status_code == 200 else None

    def metrics(self) -> Conversation[Scrape]:
        """Get the metrics of the server; raises a ValueError if the server answers with something else."""
        response = yield ApiRequest("GET", f"{self._addresses.metrics}/metrics", "inference")
        _require_ok(response)
        return read_metrics(response.text)

    def _model(self, *path: str) -> str:
        return "/".join([self._addresses.management, "models", *(quote(part, safe="") for part in path)])

    def _prediction(self, model: str, version: str | None) -> str:
        path = [model] if version is None else [model, version]
        return "/".join([self._addresses.inference, "predictions", *(quote(part, safe="") for part in path)])


def _status(version: dict[str, Any], default_version: str | None) -> VersionStatus:
    folder, _, file_name = version["modelUrl"].rpartition("/")
    claim = _CLAIM.fullmatch(folder)
    return VersionStatus(
        version=version["modelVersion"], is_default=version["modelVersion"] == default_version,
        n_workers=version["minWorkers"], n_ready=sum(worker["status"] == "READY" for worker in version["workers"]),
        pending_requests=version["jobQueueStatus"]["pendingRequests"],
        settings=RunSettings(version["batchSize"], version["maxBatchDelay"], version["responseTimeout"],
                             (version["minWorkers"], version["maxWorkers"])),
        file_name=bare_name(file_name, "the archive's name that the server reports", ServerError),
        is_downloaded="://" in folder, claim=Claim(int(claim[1]), claim[2]) if claim else None)


def _json(response: httpx.Response) -> Any:
    _require_ok(response)
    return response.json()


def _parsed(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _out_of_envelope(said: Any) -> Any:
    """Return the answer to a request of one instance, without the TorchServe envelope that it may be in."""
    with contextlib.suppress(LookupError, TypeError):
        return said["predictions"][0]
    with contextlib.suppress(LookupError, TypeError):
        return said["outputs"][0]["data"][0]
    return said


def _require_ok(response: httpx.Response) -> None:
    if not response.is_success:
        raise ServerError(f"{response.request.method} {without_credentials(str(response.url))} was answered with "
                          f"{response.status_code}: {_message(response)}{_advice(response)}")


def _advice(response: httpx.Response) -> str:
    """Return what to do about an answer whose message does not say so."""
    if response.status_code == httpx.codes.METHOD_NOT_ALLOWED:
        return "\nThe server allows this only with enable_model_api=true in its configuration: set it, and restart it"
    if "Interrupted while cleaning resources" in _message(response):
        return ("\nTorchServe ends workers with the program kill: install it where the server runs; its package is "
                "procps")
    return ""


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:500]
