"""What rollout and watch need of a server of models, whichever server it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from early_exit.handler.sample_request import SampleRequest


@dataclass(frozen=True)
class VersionStatus:
    """What a server tells of one model version."""

    version: str
    is_default: bool
    """Whether requests that name no version go to this one."""
    n_workers: int
    """How many workers the version is meant to have."""
    n_ready: int
    """How many workers can take requests now."""
    pending_requests: int
    """Requests in the version's queue; those that a worker has taken are not counted."""
    max_batch_delay_s: float
    """How long a request may wait for others to be batched with."""
    batch_size: int
    """Most requests that a worker takes at once."""
    file_name: str
    """Name of the version's archive in the server's model store."""


@dataclass(frozen=True)
class Prediction:
    """A server's answer to a prediction request, whatever its status."""

    status: int
    headers: Mapping[str, str]
    """Response headers by their names in lower case."""
    body: bytes
    error: str | None
    """Why there is no answer, in the server's words; none where the status is 200."""


class ModelServer(Protocol):
    """One server of models with its model store; `str()` of it names it in messages.

    Each method raises a ServerError where the server does not answer, or refuses.
    """

    @property
    def has_secret(self) -> bool:
        """Whether the secret is known with which the server's workers let themselves be probed and requests run to the
        end."""

    def versions(self, model: str) -> list[VersionStatus]:
        """Return the registered versions of a model, none when it is not registered."""

    def register(self, file_name: str, workers: int) -> None:
        """Load an archive of the model store as a new version; its workers start in the background."""

    def scale(self, model: str, version: str, workers: int) -> None:
        """Let a version have so many workers; they start in the background."""

    def set_default(self, model: str, version: str) -> None:
        """Send the requests that name no version to this one from now on."""

    def unregister(self, model: str, version: str) -> None:
        """Remove a version at once, with whatever it has not answered."""

    def probe(self, model: str, version: str) -> dict[str, Any]:
        """Let a version check itself; return what its probe says: 'backbone' (sha256) and 'plan' (digest or None).

        It takes the secret.
        """

    def predict(self, model: str, version: str, request: SampleRequest, *, to_the_end: bool = False) -> Prediction:
        """Return a version's answer to a request; one that is refused raises a ServerError.

        Args:
            model: name of a served model.
            version: a registered version of it.
            request: what is sent.
            to_the_end: whether the request runs through the whole backbone, whatever the exits say; it takes the
                secret.
        """
