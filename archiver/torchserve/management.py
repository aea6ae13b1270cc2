"""A client of TorchServe's management API, and of the predictions that a roll tries out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from early_exit.archiver.torchserve.addresses import Addresses, read_token
from early_exit.handler.errors import ServerError
from early_exit.handler.protocol import ANYTIME_HEADER, PROBE_HEADER

_TIMEOUT_S = 30.0
_TOKEN_REFUSED = "Token either incorrect, expired"
"""In TorchServe's answer to a token that is wrong or has expired."""


@dataclass(frozen=True)
class VersionStatus:
    """What TorchServe tells of one model version."""

    version: str
    is_default: bool
    n_workers: int
    """Wanted."""
    n_ready: int
    pending_requests: int
    """In the version's queue; those that a worker has taken are not counted."""
    max_batch_delay_s: float
    batch_size: int
    """Most requests that a worker takes at once."""
    file_name: str
    """Of its archive in the model store."""


class Management:
    """The management API of one server."""

    def __init__(self, addresses: Addresses, key_file: Path | None) -> None:
        """Remember where the server is and where its tokens are.

        Args:
            addresses: of the server.
            key_file: TorchServe's key_file.json; none when its token authorisation is off.
        """
        self._addresses, self._key_file = addresses, key_file

    def __str__(self) -> str:
        return self._addresses.management

    def versions(self, model: str) -> list[VersionStatus]:
        """Return the registered versions of a model, none when it is not registered."""
        url = f"{self._addresses.management}/models/{model}"
        default = self._call("GET", url)  # without a version TorchServe describes the default
        if default.status_code == 404:
            return []
        default_version = _json(default)[0]["modelVersion"]
        return [_status(version, default_version) for version in _json(self._call("GET", url + "/all"))]

    def register(self, file_name: str, workers: int) -> None:
        """Load an archive of the model store as a new version; its workers start in the background."""
        _require_ok(self._call("POST", f"{self._addresses.management}/models",
                               params={"url": file_name, "initial_workers": workers, "synchronous": "false"}))

    def scale(self, model: str, version: str, workers: int) -> None:
        """Let a version have so many workers; they start in the background."""
        _require_ok(self._call("PUT", f"{self._addresses.management}/models/{model}/{version}",
                               params={"min_worker": workers, "max_worker": workers, "synchronous": "false"}))

    def set_default(self, model: str, version: str) -> None:
        """Send the requests that name no version to this one from now on."""
        _require_ok(self._call("PUT", f"{self._addresses.management}/models/{model}/{version}/set-default"))

    def unregister(self, model: str, version: str) -> None:
        """Remove a version at once, with whatever it has not answered."""
        _require_ok(self._call("DELETE", f"{self._addresses.management}/models/{model}/{version}"))

    def probe(self, model: str, version: str) -> dict[str, Any]:
        """Let a version check itself through the inference address."""
        response = self._call("POST", f"{self._addresses.inference}/predictions/{model}/{version}", key="inference",
                              headers={PROBE_HEADER: "1"}, data=b"probe")
        found: dict[str, Any] = _json(response)
        return found

    def predict(self, model: str, version: str, body: bytes, *, to_the_end: bool = False) -> bytes:
        """Return a version's answer to a request.

        Args:
            model: a served model.
            version: registered.
            body: of the request.
            to_the_end: whether the request runs through the whole backbone, whatever the exits say.

        Raises:
            ServerError: it is not answered with 200.
        """
        response = self._call("POST", f"{self._addresses.inference}/predictions/{model}/{version}", key="inference",
                              headers={ANYTIME_HEADER: "1"} if to_the_end else {}, data=body)
        _require_ok(response)
        return response.content

    def _call(self, method: str, url: str, *, key: str = "management", headers: dict[str, str] | None = None,
              params: dict[str, Any] | None = None, data: bytes | None = None) -> requests.Response:
        def send() -> requests.Response:
            return self._send(method, url, key, headers=headers or {}, params=params, data=data)

        response = send()
        return send() if self.renewed(key, response.status_code, response.text) else response

    def renewed(self, key: str, status: int, text: str) -> bool:
        """Get a new 'inference' or 'management' token where an answer says that the old one is refused.

        A watcher outlives its tokens. TorchServe writes the new one into its key file, and accepts the token for this
        from that file only.

        Raises:
            ServerError: TorchServe does not answer, or the key file cannot be read.
        """
        refused = self._key_file is not None and status in (400, 401) and _TOKEN_REFUSED in text
        if refused:
            self._send("GET", f"{self._addresses.management}/token", "API", params={"type": key})
        return refused

    def _send(self, method: str, url: str, key: str, *, headers: dict[str, str] | None = None,
              params: dict[str, Any] | None = None, data: bytes | None = None) -> requests.Response:
        token = {"Authorization": f"Bearer {read_token(self._key_file, key)}"} if self._key_file else {}
        try:
            return requests.request(method, url, headers={**token, **(headers or {})}, params=params, data=data,
                                    timeout=_TIMEOUT_S)
        except requests.RequestException as error:
            raise ServerError(f"no answer from {url}: {type(error).__name__}. Is TorchServe running there?") from error


def _status(version: dict[str, Any], default_version: str) -> VersionStatus:
    workers = version["workers"]
    return VersionStatus(
        version=version["modelVersion"], is_default=version["modelVersion"] == default_version,
        n_workers=version["minWorkers"], n_ready=sum(worker["status"] == "READY" for worker in workers),
        pending_requests=version["jobQueueStatus"]["pendingRequests"],
        max_batch_delay_s=version["maxBatchDelay"] / 1000, batch_size=version["batchSize"],
        file_name=version["modelUrl"].rsplit("/", 1)[-1])


def _json(response: requests.Response) -> Any:
    _require_ok(response)
    return response.json()


def _require_ok(response: requests.Response) -> None:
    if not response.ok:
        raise ServerError(f"{response.request.method} {response.url} was answered with {response.status_code}: "
                          f"{response.text.strip()[:500]}")
