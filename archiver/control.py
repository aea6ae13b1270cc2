"""What rollout and watch need of a server of models, whichever server it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from early_exit.handler.sample_request import SampleRequest


@dataclass(frozen=True)
class RunSettings:
    """How a version is run: what the configuration of its archive may say, and otherwise who registers it."""

    batch_size: int | None = None
    """Most requests that a worker takes at once; None where nobody has said."""
    max_batch_delay_ms: int | None = None
    """How long a request may wait for others to be batched with."""
    response_timeout_s: int | None = None
    """How long a worker may take for a batch."""
    workers: tuple[int, int] | None = None
    """The least and the most workers."""


@dataclass(frozen=True, order=True)
class Claim:
    """The mark that a roll leaves on the version that it registers, so that it knows it from those of its rivals."""

    ticket: int
    """One above every ticket that the roll saw when it began."""
    nonce: str
    """Random; letters and digits."""


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
    settings: RunSettings
    """How it is run; all of them are known."""
    file_name: str
    """Name of the version's archive in the server's model store."""
    is_downloaded: bool = False
    """Whether the server fetched the archive into its store by a URL; TorchServe deletes it there with the version."""
    claim: Claim | None = None
    """Of the roll that registered it; none where no roll did, or the server has been restarted since."""


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

    def models(self) -> list[str]:
        """Return the names of the models that are registered."""

    def versions(self, model: str) -> list[VersionStatus]:
        """Return the registered versions of a model, none when it is not registered.

        The default is asked for first: a version that becomes the default meanwhile may still be told as none.
        """

    def register(self, file_name: str, settings: RunSettings, *, model: str | None = None,
                 claim: Claim | None = None) -> None:
        """Load an archive of the model store as a new version; its workers start in the background.

        Args:
            file_name: of the archive.
            settings: what the server is told; the rest is left to the archive's configuration and the server's.
            model: name to serve it under, by default what the archive says.
            claim: the mark by which the version is known from then on.
        """

    def scale(self, model: str, version: str, workers: tuple[int, int]) -> None:
        """Let a version have at least and at most so many workers; they start in the background."""

    def set_default(self, model: str, version: str, *, limit_s: float) -> None:
        """Send the requests that name no version to this one from now on.

        Args:
            model: name of a served model.
            version: a registered version of it.
            limit_s: how long the server may take for it; after that a ServerError says that it gave no answer, and
                whether it did it is not known.
        """

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
